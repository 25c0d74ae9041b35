"""Binaries on top of jaxsms."""
