"""The guide, a chapter each.

- `jaxsms.guide.method`: the method on one page.
- `jaxsms.guide.own_code`: your own network and training, in any framework.
- `jaxsms.guide.recipes`: complete programs with batch norm, dropout, TrainState, and a
  schedule of sparsity inside an optimizer.
- `jaxsms.guide.shrinking`: channels, networks cut to what is left, soups of those.
- `jaxsms.guide.main_job`: the main job, comparisons, reports, taking the soup away.
- `jaxsms.guide.choosing`: how many copies, which sparsity, which schedule.
- `jaxsms.guide.devices`: speed, memory, several devices and hosts.
- `jaxsms.guide.troubleshooting`: what the programs say, and what to do.
- `jaxsms.guide.coming_from_jaxpruner`: its names and what they are here.
"""
