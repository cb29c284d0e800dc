"""What krelay itself needs and runs on: privileges, packages, queue, rules, its file tree."""

from krelay.doctor.facts import Facts, Leftover
from krelay.doctor.findings import FAILED, OK, WARNING, Finding, not_tried
from krelay.rules import ruleset

FILES_A_CONNECTION = 2
FILES_WANTED = 4096


def privileges(facts: Facts) -> list[Finding]:
    """CAP_NET_ADMIN for rules and queue, CAP_NET_RAW for answers to what is refused."""
    wanting = [
        name
        for name, held in (("CAP_NET_ADMIN", facts.net_admin), ("CAP_NET_RAW", facts.net_raw))
        if not held
    ]
    if wanting:
        text = f"{' and '.join(wanting)} wanting, which krelay needs for its rules and its queue"
        fix = f"sudo krelay doctor{facts.root_option}"
        return [Finding("privileges", FAILED, text, fix, fatal=True)]
    who = "root" if facts.uid == 0 else f"user {facts.uid}"
    return [Finding("privileges", OK, f"{who}, with CAP_NET_ADMIN and CAP_NET_RAW")]


def packages(facts: Facts) -> list[Finding]:
    """What krelay imports."""
    if facts.missing_packages:
        names = " ".join(facts.missing_packages)
        fix = f"pip install {names}"
        return [Finding("packages", FAILED, f"can't be imported: {names}", fix, fatal=True)]
    return [Finding("packages", OK, "all Python packages are there")]


def queue(facts: Facts) -> list[Finding]:
    """The netfilter queue: in the kernel, free, and not overflowing."""
    check, number = "queue", facts.queue_num
    if facts.has_queue is False:
        text = "the kernel has no netfilter queue (CONFIG_NETFILTER_NETLINK_QUEUE)"
        return [Finding(check, FAILED, text, "modprobe nfnetlink_queue", fatal=True)]
    if facts.queue_taken:
        other = number + 1 if number < 0xFFFF else number - 1
        text = f"queue {number} is served by another program"
        fix = f"krelay daemon{facts.root_option} --queue-num {other}"
        return [Finding(check, FAILED, text, fix, fatal=True)]
    full, buffer = facts.queue_lost
    if full or buffer:
        text = (
            f"the kernel dropped {full} packets because queue {number} was full and {buffer} "
            "because its buffer was: more comes than can be rewritten"
        )
        return [Finding(check, WARNING, text)]
    return [Finding(check, OK, f"the kernel has the queue, and {number} is krelay's")]


def rules(facts: Facts) -> list[Finding]:
    """A way to make rules."""
    if facts.backend is not None:
        return [Finding("rules", OK, f"by {facts.backend}")]
    if not facts.backend_problem:
        return [not_tried("rules", dict(facts.unseen).get("rules", "nobody has looked"))]
    fix = "apt-get install nftables iptables" if "not installed" in facts.backend_problem else ""
    return [Finding("rules", FAILED, facts.backend_problem, fix, fatal=True)]


def datapath(facts: Facts) -> list[Finding]:
    """Whether the kernel relays by itself what krelay has decided about."""
    if facts.backend is None:
        return [not_tried("datapath", "without a way to make rules there is no data path")]
    if facts.config.datapath == "queue":
        return [Finding("datapath", OK, "every packet visits krelay, as the setting says")]
    if facts.datapath == "kernel":
        return [Finding("datapath", OK, "flows are offloaded to the kernel")]
    reason = facts.datapath.removeprefix("queue").strip(" ()")
    fix = "" if facts.backend.startswith("nft") else "apt-get install nftables"
    return [Finding("datapath", WARNING, f"every packet visits krelay: {reason}", fix)]


def serving(facts: Facts) -> list[Finding]:
    """What a krelay that runs says of itself, and whether a tcp-relay is with it."""
    if not facts.served:
        here = "" if facts.tree_exists else f"; there is no {facts.root}, so defaults are checked"
        return [Finding("krelay", OK, f"none is running{here}")]
    if facts.state is not None and facts.state.startswith("failed: "):
        return [Finding("krelay", FAILED, facts.state, f"krelay start{facts.root_option}")]
    if facts.tcp_relays == 0 and facts.config.terminated:
        text = "no tcp-relay serves with it: TCP is refused"
        return [Finding("krelay", WARNING, text, f"tcp-relay{facts.root_option} &")]
    return [Finding("krelay", OK, facts.state or "running")]


def tree(facts: Facts) -> list[Finding]:
    """Whether the file tree can be served, and which process serves it."""
    if facts.tree_fault:
        return [Finding("file tree", FAILED, facts.tree_fault, facts.tree_fix)]
    if facts.tree_state != "ok":
        text = f"what is in force can't be shown: {facts.tree_state}"
        return [Finding("file tree", WARNING, text)]
    return [Finding("file tree", OK, f"nobody else can change {facts.root}")]


def buffer(facts: Facts) -> list[Finding]:
    """A process with CAP_NET_ADMIN may go over rmem_max (SO_RCVBUFFORCE, socket(7)); a user
    namespace's root may not."""
    check = "buffer"
    if facts.rmem_max is None and not facts.buffer_is_granted:
        return [not_tried(check, "this network namespace doesn't show net.core.rmem_max")]
    if facts.buffer_is_granted or facts.rmem_max is None or facts.rmem_max >= facts.buffer:
        return [Finding(check, OK, f"{facts.buffer} bytes for the queue's socket")]
    text = f"the queue's socket gets {facts.rmem_max} bytes instead of {facts.buffer}"
    if facts.net_admin:
        text += ", as in any user namespace; root outside of it may raise the limit"
    fix = f"sysctl -w net.core.rmem_max={facts.buffer}"
    return [Finding(check, WARNING, text, fix, safe=not facts.net_admin)]


def files(facts: Facts) -> list[Finding]:
    """tcp-relay takes what it can get, the hard limit; a connection costs two."""
    if facts.files is None:
        return [not_tried("files", "how many may be open isn't known")]
    most = facts.files // FILES_A_CONNECTION
    if facts.files < FILES_WANTED:
        text = f"{facts.files} files may be open: about {most} TCP connections at a time"
        return [Finding("files", WARNING, text, "ulimit -Hn 65536")]
    return [Finding("files", OK, f"{facts.files} may be open: {most} TCP connections at a time")]


def leftovers(facts: Facts) -> list[Finding]:
    """What a killed krelay left: its rules drop what they catch while no krelay serves the
    queue."""
    findings = []
    for left in facts.leftovers:
        text = (
            f"rules of a krelay that is gone ({left.name}, {left.tool}): what they catch is dropped"
        )
        safe = left.name == facts.instance
        findings.append(Finding("leftovers", WARNING, text, _removal(facts, left), safe))
    if facts.stale_sockets and not facts.leftovers:
        text = f"{facts.root} holds sockets of a krelay that is gone"
        fix = f"krelay clean --keep-settings{facts.root_option}"
        findings.append(Finding("leftovers", WARNING, text, fix, safe=True))
    return findings or [Finding("leftovers", OK, "nothing of a dead krelay's")]


def _removal(facts: Facts, left: Leftover) -> str:
    """`krelay clean` where it is this tree's; the tree of another can't be told from the name."""
    if left.name == facts.instance:
        return f"krelay clean --keep-settings{facts.root_option}"
    if left.tool == "nft":
        return f"nft delete table ip {left.name}"
    return "; ".join(
        f"{left.tool} -w -t {chain.table} {command}"
        for chain in ruleset.chains(left.name)
        for command in (
            f"-D {chain.builtin} -j {chain.name}",
            f"-F {chain.name}",
            f"-X {chain.name}",
        )
    )
