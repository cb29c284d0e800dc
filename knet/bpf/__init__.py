"""Programs in the kernel's packet path (eBPF), loaded and read without a library.

objectfile  a compiled file: its maps, its programs, who made it (pure)
kernel      maps and programs: made, filled, read, tried (bpf(2))
ring        what programs tell, read from the memory that they share with us
"""
