"""The steps in which packets are rewritten: the words that rules, the table and traces share.

A packet is caught at a hook, PREROUTING or POSTROUTING, and each rewriting of it is a step with a
label.  C is the client, K this host, S the server, :A the gateway port where tcp-relay listens; y
is tcp-relay's own port towards the server, or the relay port of a flow.

    step   hook          packet            becomes           who sends in it
    T1     PREROUTING    C:x > K:80        C:x > K:A         the client (client leg)
    T2     POSTROUTING   K:A > C:x         K:80 > C:x        tcp-relay, to the client
    T3     POSTROUTING   K:y > S:80        C:y > S:80        tcp-relay, to the server
    T4     PREROUTING    S:80 > C:y        S:80 > K:y        the server (server leg)
    U1,U2  PREROUTING    C:x > K:53        C:x > S:53        the client
    U3,U4  POSTROUTING   S:53 > C:x        K:53 > C:x        the server
      U1   PREROUTING    C:x > K:53        C:y > S:53        the client         } the same with
      U2   POSTROUTING   C:y > S:53        K:y > S:53        (seen once more)   } source=relay
      U3   PREROUTING    S:53 > K:y        S:53 > C:y        the server         }
      U4   POSTROUTING   S:53 > C:y        K:53 > C:x        (seen once more)   }
    D1     either        C:p > S:80        C:q > S:80        the client, past the relay
    D2     either        S:80 > C:q        S:80 > C:p        the server, answering that

T1 to T4 are of TCP that tcp-relay terminates.  U1 to U4 are of UDP, and of TCP that is forwarded.
With source=relay they are taken each by itself, since the relay's own address may not be the source
of a packet that is still to be forwarded (it would be a martian): between the hooks such a packet
travels as C:y, so that it can't be mistaken for another flow's.  D1 and D2 move a client's own
conversation with the server away from a port that a flow has (nat/table.py).
"""

from enum import IntEnum


class Hook(IntEnum):
    """Where a packet was caught, by the numbers of linux/netfilter.h."""

    PREROUTING = 0
    POSTROUTING = 4


class Step(IntEnum):
    """One rewriting of one packet, as the table above labels them."""

    T1 = 0
    T2 = 1
    T3 = 2
    T4 = 3
    U1 = 4
    U2 = 5
    U3 = 6
    U4 = 7
    U12 = 8
    """U1 and U2 at once: with source=client one rewriting does both."""
    U34 = 9
    D1 = 10
    D2 = 11

    @property
    def label(self) -> str:
        """For people: `T1`, `U1,U2`."""
        return {Step.U12: "U1,U2", Step.U34: "U3,U4"}.get(self, self.name)


class Side(IntEnum):
    """Which end sent a packet: a real end of the conversation, or tcp-relay on one of its legs."""

    CLIENT = 0
    SERVER = 1
    TO_CLIENT = 2
    TO_SERVER = 3


SIDES = {
    Step.T1: Side.CLIENT,
    Step.U1: Side.CLIENT,
    Step.U12: Side.CLIENT,
    Step.D1: Side.CLIENT,
    Step.T4: Side.SERVER,
    Step.U3: Side.SERVER,
    Step.U34: Side.SERVER,
    Step.D2: Side.SERVER,
}
"""Which end's packets a step rewrites; steps not listed see a packet once more, or tcp-relay's."""
SENDERS = SIDES | {Step.T2: Side.TO_CLIENT, Step.T3: Side.TO_SERVER}
"""The same with tcp-relay's own packets; steps not listed see a packet once more."""
