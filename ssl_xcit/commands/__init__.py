"""The commands, one file each: settings in, a room called, results printed."""
