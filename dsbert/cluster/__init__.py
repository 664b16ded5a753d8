"""Processes on machines: how ranks start, meet, are watched and end.

launcher         ranks as child processes; ranks.py who we are under any launcher
rendezvous       where ranks meet; endpoint.py addresses, handshake.py and sealed_store.py that no stranger is among
                 them, secret.py what they know
process_group    torch's process group
heartbeats       what every rank tells of itself, in files; health.py the watchdog that reads them
signals          a flag that is set by SIGTERM and others; memory_kills.py the kernel's memory killer
"""
