"""The operations. Those that no function of gpukern's offers are imported here, so that saved graphs find them."""

from gpukern.ops import conv_max_pool2d as conv_max_pool2d
