"""A GPU that is rented for minutes: everything it will run is compiled and tried here first, without one."""
