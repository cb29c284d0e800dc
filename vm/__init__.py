"""krelay_vm: virtual hosts for demos and tests.

The folder is vm/; the package is found by the link krelay_vm beside it, which is also its name
where it is installed: in site-packages `vm` is another project's.

    topology      a network as data, everything derived from hosts and links     (pure)
    topologyfile  a network read from a TOML file                                (pure)
    guest         what a virtual machine is told, as text                        (pure)
    kmod          kernel modules in the order to insert them                     (pure)
    cpio          the archive that a kernel's first file system comes in         (pure)
    errors        what goes wrong in a lab                                       (pure)
    ------------------------------------------------------------------------------
    netns         hosts as network namespaces of this kernel, and the cabling of machines
    kernels       what there is to boot on this machine, or why there is nothing
    machine       hosts as virtual machines, each with a kernel of its own
    xstate.c      preloaded into a User-Mode Linux that doesn't know all registers of the processor
    registry      which labs are on this machine
    build         a lab is built, booted and removed
    program       programs in a host: run, started, ended
    wires         frames of an interface, who listens, cables pulled
    signals       what ends a process waits, or ends it in order
    lab           a network while a `with` block runs, and the programs in it
    attended      what a person does with a lab at a terminal
    __main__      the same for people: python -m krelay_vm

Nothing of a lab touches the root namespace: no device, no address, no rule.  Of krelay only the
formats are imported, knet.wire.

    >>> from krelay_vm import DEFAULT
    >>> DEFAULT.interface("relay", towards="server").address
    '192.168.0.2'
"""

from krelay_vm.errors import LabError, LabTimeout
from krelay_vm.lab import Lab
from krelay_vm.program import Program, Result
from krelay_vm.topology import (
    DEFAULT,
    Host,
    Interface,
    Link,
    Segment,
    Topology,
    TopologyError,
    draw,
    relay_topology,
)

__all__ = [
    "DEFAULT",
    "Host",
    "Interface",
    "Lab",
    "LabError",
    "LabTimeout",
    "Link",
    "Program",
    "Result",
    "Segment",
    "Topology",
    "TopologyError",
    "draw",
    "relay_topology",
]
