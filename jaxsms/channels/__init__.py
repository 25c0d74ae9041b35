"""Channels: groups of those that go together, and networks cut to the ones that stay."""

from jaxsms.channels.cutting import Compact, compact, compact_from
from jaxsms.channels.groups import ChannelGroup, ChannelGroups, channel_groups

__all__ = [
  "ChannelGroup",
  "ChannelGroups",
  "Compact",
  "channel_groups",
  "compact",
  "compact_from",
]
