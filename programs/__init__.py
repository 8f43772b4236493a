"""What the programs share: flags' help, bars, loading that names what was given, signals."""
