"""The mesh of devices and the processes of one engine."""
