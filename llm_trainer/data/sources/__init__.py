"""Documents from files of many kinds, from the hub, and from Python itself, in units that workers share."""
