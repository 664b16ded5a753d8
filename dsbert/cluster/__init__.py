"""Processes on machines: how ranks start, meet, are watched and end.

launcher         ranks as child processes; ranks.py what any launcher says of this one (RankInfo)
rendezvous       where ranks meet; endpoint.py addresses, handshake.py and sealed_store.py that no stranger is among
                 them, secret.py what they know
process_group    torch's process group, and this rank in it (World)
heartbeats       what every rank tells of itself, in files; health.py the watchdog that reads them
stragglers       who is slower than the others, and why
signals          a request to stop, made by SIGTERM and others; memory_kills.py the kernel's memory killer
"""
