"""The commands of evaluation, one file each: settings in, a room called, results printed."""
