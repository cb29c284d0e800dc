// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The data path in the kernel: packets of offloaded flows are rewritten where they come in and go
 * out (tc, clsact).  What krelay's worker has decided for the packets of a flow stands in the map
 * `rewrites`, and is done here.  Whatever isn't there, or isn't plain, goes on as it came: the rules
 * of netfilter send it to the worker.
 *
 * But a query to a name server begins a flow here, where there is only one way to relay it: what
 * isn't so is excepted by `minded` and `strangers`.  It stands in `queries` until it is answered, and
 * krelay is told of both packets.  It gets a priority of its own, by which a rule sends it to the
 * server: rules of the host that stand before ours may go by which address was asked.
 *
 *	incoming	before PREROUTING: does T1, T4, U1, U3 and U1,U2, and gives the packet a
 *			priority, by which a rule lets it pass
 *	passes		asked by a rule in POSTROUTING: whether `outgoing` will rewrite the packet; if so
 *			the rule marks it and lets it pass, too
 *	outgoing	behind POSTROUTING: does T2, T3, U2, U4 and U3,U4 for what is marked.  What the
 *			worker has rewritten isn't: it may read as another packet that is in the map
 *
 * A mark would not do where packets come in: rules of the host's may set theirs as a whole, before
 * ours see it.  Of priorities nothing is lost: the kernel gives what it forwards another one
 * (ip_forward, net/ipv4/ip_forward.c), and asks for none where it delivers.
 *
 * A source of this host's own can't be set where the packet comes in: the kernel drops it as a
 * martian (ip_route_input_slow, net/ipv4/route.c).  What goes out may have been cut into fragments
 * by then, whose ports can't be seen: where the link or the route takes less, and where it came in
 * such pieces (ip_do_fragment, net/ipv4/ip_output.c).  So `incoming` notes what came whole
 * (`tc_index`), `links` says what each link takes, and the worker gets what might be cut.
 *
 * Of what tcp-relay itself sends, krelay is told of the FINs and of the SYN with which it begins a
 * connection to the server.
 *
 * The programs of tc return TC_ACT_UNSPEC: filters of others behind ours have their turn.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

/* Of krelay/rules/offloaded.py */
#define REWRITTEN 0x6b726c79
#define MARKED 0x10000000

/* Bytes of a query: longer ones might not fit the link to the server */
#define LONGEST_QUERY 576
#define DNS_PORT 53

/* `tc_index` of what came in one piece */
#define CAME_WHOLE 0x6b72

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10

struct map_def { u32 type, key, value, capacity, flags; };

/*
 * What stands on the stack for a map is set by whole words: where a program may not leak pointers (no
 * CAP_PERFMON), Linux 6.1 takes a word whose first part was set for a spilled register, and refuses
 * to have the rest set (check_stack_write_fixed_off, kernel/bpf/verifier.c).
 */

/* IPv4 as ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2); of that the last two words */
struct address { u64 zero, v4; };

struct rewrite_key { struct address src, dst; u64 rest; };	/* source and destination port, protocol */

/*
 * OUTGOING: done where the packet goes out.  RELAYS_OWN: tcp-relay sends these.  MAY_BEGIN: its
 * connection to the server may begin.  HAS_BEGUN: it has, with the number `began`.  ONE_DSCP: all
 * packets have that of `tos`.
 */
enum { OUTGOING = 1, RELAYS_OWN = 2, MAY_BEGIN = 4, HAS_BEGUN = 8, ONE_DSCP = 16 };

struct rewrite {
	struct address src, dst;
	u16 sport, dport;
	u8 step, flags;
	u8 mask, value;		/* TCP: those of its flags that matter, and what they must be */
	u8 tos, pad[3];
	u32 began;
	u64 packets, bytes;
	u64 heard;		/* nanoseconds of CLOCK_MONOTONIC */
};

/* Steps of krelay/steps.py: those of a query and of its answer */
enum { U12 = 8, U34 = 9 };

/* An end of a conversation. */
struct end { struct address addr; u64 port; };

/* Queries of a client's from one port: `asked` is the address of this host that they went to. */
struct query { struct address asked, server; u64 waiting; };

/*
 * Where queries go that begin flows here, whether `minded` has ever had anything, and the priority
 * by which the rules of this krelay know them.
 */
struct learning { struct address server; u32 minds, priority; };

/* A part of all addresses (LPM). */
struct network { u64 length, middle, v4; };

/* A query or an answer that was relayed: by the ends of the query as it came. */
struct exchange { u8 is_answer, pad; u16 size; u32 src, dst; u16 sport, dport; u8 room[24]; };

/* A packet of tcp-relay's that changes how its connection stands. */
struct event { struct rewrite_key key; u32 seq; u8 step, flags, pad[2]; };

enum { LOST, STEPS = 2 };	/* `totals`: events that were lost; then a number a step, UDP first */
#define MOST_STEPS 16

/* by link that has the programs: bytes of the longest packet that leaves whole by it */
struct map_def links SEC("maps") = { BPF_MAP_TYPE_HASH, sizeof(u32), sizeof(u32), 4096, 0 };
/* a bit a port, 64 ports an element, UDP's first: whether any rewrite is of packets to it or from it */
struct map_def ports SEC("maps") = { BPF_MAP_TYPE_ARRAY, sizeof(u32), sizeof(u64), 2048, 0 };
/* made room for as it fills: only krelay puts anything in, which may take its time */
struct map_def rewrites SEC("maps") = { BPF_MAP_TYPE_HASH, sizeof(struct rewrite_key), sizeof(struct rewrite), 1 << 18, BPF_F_NO_PREALLOC };
struct map_def events SEC("maps") = { BPF_MAP_TYPE_RINGBUF, 0, 0, 1 << 20, 0 };
/* by 0; empty: no query begins a flow here */
struct map_def learning SEC("maps") = { BPF_MAP_TYPE_HASH, sizeof(u32), sizeof(struct learning), 1, 0 };
/* the addresses of this host that may be asked */
struct map_def hosts SEC("maps") = { BPF_MAP_TYPE_HASH, sizeof(struct address), sizeof(u32), 4096, BPF_F_NO_PREALLOC };
/* clients about whose queries the worker decides */
struct map_def strangers SEC("maps") = { BPF_MAP_TYPE_LPM_TRIE, sizeof(struct network), sizeof(u32), 1 << 16, BPF_F_NO_PREALLOC };
/* ends of clients and others whose packets may be none of a new flow's: until when, in nanoseconds */
struct map_def minded SEC("maps") = { BPF_MAP_TYPE_LRU_HASH, sizeof(struct end), sizeof(u64), 1 << 16, 0 };
struct map_def queries SEC("maps") = { BPF_MAP_TYPE_HASH, sizeof(struct end), sizeof(struct query), 1 << 16, 0 };
struct map_def exchanges SEC("maps") = { BPF_MAP_TYPE_RINGBUF, 0, 0, 1 << 22, 0 };
struct map_def totals SEC("maps") = { BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(u32), sizeof(u64), STEPS + 2 * MOST_STEPS, 0 };
char _compiler[] SEC("compiler") = "clang " __clang_version__;

/* All as whole words, so that they are spilled as such (above). */
struct packet {
	u64 src, dst, seq;
	u64 sport, dport, size, header;	/* `header`: of IP and transport together */
	u64 proto, flags, tos, ttl, may_be_cut;
};

static __always_inline void count(u32 which, u64 by)
{
	u64 *sum = bpf_map_lookup_elem(&totals, &which);

	if (sum)
		*sum += by;
}

/* The plain heads of a packet, as they stand there. */
struct heads { u8 ip[20], transport[20]; };

/* Whether it is plain: TCP or UDP, without options of IP, no fragment. */
static __always_inline int parse(const struct heads *h, struct packet *p)
{
	const struct iphdr *ip = (const struct iphdr *)h->ip;

	p->proto = ip->protocol;
	if (h->ip[0] != 0x45 || ip->frag_off & bpf_htons(0x3fff))
		return 0;
	p->src = ip->saddr;
	p->dst = ip->daddr;
	p->tos = ip->tos;
	p->ttl = ip->ttl;
	p->size = bpf_ntohs(ip->tot_len);
	p->may_be_cut = !(ip->frag_off & bpf_htons(0x4000));
	p->sport = *(u16 *)h->transport;
	p->dport = *(u16 *)(h->transport + 2);
	p->header = 28;
	p->flags = 0;
	p->seq = 0;
	if (p->proto == IPPROTO_TCP) {
		p->seq = bpf_ntohl(*(u32 *)(h->transport + 4));
		p->header = 20 + (h->transport[12] >> 4) * 4;
		p->flags = h->transport[13];
	}
	return p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP;
}

/* Reads them behind a head of the link's of so many bytes; UDP may end before what TCP has. */
static __always_inline int load(struct __sk_buff *skb, const u32 link, struct packet *p)
{
	struct heads h = {};

	if (bpf_skb_load_bytes(skb, link, &h, 28))
		return 0;
	if (h.ip[9] == IPPROTO_TCP && bpf_skb_load_bytes(skb, link + 28, h.transport + 8, 12))
		return 0;
	return parse(&h, p);
}

/* A look-up of `rewrites` mostly misses the cache: here it is known at once where there are none. */
static __always_inline int is_used(u8 proto, u16 port)
{
	u32 number = bpf_ntohs(port), at = (number >> 6) + (proto == IPPROTO_TCP ? 1024 : 0);
	u64 *ports64 = bpf_map_lookup_elem(&ports, &at);

	return ports64 && *ports64 >> (number & 63) & 1;
}

static __always_inline void set(struct address *address, u32 v4)
{
	address->zero = 0;
	address->v4 = bpf_htonl(0xffff) | (u64)v4 << 32;
}

static __always_inline u32 v4_of(const struct address *address)
{
	return address->v4 >> 32;
}

static __always_inline void fill(struct rewrite_key *key, const struct packet *p)
{
	set(&key->src, p->src);
	set(&key->dst, p->dst);
	key->rest = p->sport | (u64)p->dport << 16 | (u64)p->proto << 32;
}

/* Of a train that the kernel carries as one, every packet counts, with headers of its own. */
static __always_inline void note(struct __sk_buff *skb, const u32 link, struct packet *p, struct rewrite *r)
{
	u32 packets = skb->gso_segs > 1 ? skb->gso_segs : 1;
	u64 bytes = p->size;	/* not `len`: a short frame is padded (IEEE 802.3, 3.2.8) */

	if (packets > 1)
		bytes = (u64)skb->len - link + (u64)(packets - 1) * p->header;
	__sync_fetch_and_add(&r->packets, packets);
	__sync_fetch_and_add(&r->bytes, bytes);
	if (!(p->flags & RST))	/* RFC 7857, section 2.2: it keeps no flow alive */
		r->heard = bpf_ktime_get_ns();
	count(STEPS + (p->proto == IPPROTO_TCP ? MOST_STEPS : 0) + (r->step & (MOST_STEPS - 1)), packets);
}

static __always_inline void tell(struct rewrite_key *key, struct rewrite *r, struct packet *p)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(LOST, 1);
		return;
	}
	e->key = *key;
	e->seq = p->seq;
	e->step = r->step;
	e->flags = p->flags;
	e->pad[0] = e->pad[1] = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
}

/* Both checksums are set by their differences (RFC 1624); a partial one only has the addresses. */
static __always_inline void set_address(struct __sk_buff *skb, const u32 link, u8 proto, const u32 at, u64 from, u64 to)
{
	u32 check = link + 20 + (proto == IPPROTO_TCP ? 16 : 6);
	u64 how = BPF_F_PSEUDO_HDR | (proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0) | 4;

	if (from == to)
		return;
	bpf_l4_csum_replace(skb, check, from, to, how);
	bpf_l3_csum_replace(skb, link + offsetof(struct iphdr, check), from, to, 4);
	bpf_skb_store_bytes(skb, link + at, &to, 4, 0);
}

static __always_inline void set_port(struct __sk_buff *skb, const u32 link, u8 proto, const u32 at, u64 from, u64 to)
{
	u32 check = link + 20 + (proto == IPPROTO_TCP ? 16 : 6);
	u64 how = (proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0) | 2;

	if (from == to)
		return;
	bpf_l4_csum_replace(skb, check, from, to, how);
	bpf_skb_store_bytes(skb, link + 20 + at, &to, 2, 0);
}

/* Of a train each packet. */
static __always_inline u32 longest(struct __sk_buff *skb, struct packet *p)
{
	return skb->gso_segs > 1 ? skb->gso_size + p->header : p->size;
}

/* Tells of a query, or its answer; 0: there is no room for that. */
static __always_inline struct exchange *reserve(void)
{
	return bpf_ringbuf_reserve(&exchanges, sizeof(struct exchange), 0);
}

static __always_inline void submit(struct exchange *e, u8 is_answer, u16 size, u32 client, u32 asked, u16 sport, u16 dport)
{
	e->is_answer = is_answer;
	e->pad = 0;
	e->size = size;
	e->src = client;
	e->dst = asked;
	e->sport = sport;
	e->dport = dport;
	__builtin_memset(e->room, 0, sizeof(e->room));
	bpf_ringbuf_submit(e, 0);	/* wakes krelay if it has read all that was before */
}

static __always_inline int is_stranger(const struct learning *l, struct end *client)
{
	struct network network = { 128, (u64)bpf_htonl(0xffff) << 32, v4_of(&client->addr) };
	u64 *until = l->minds ? bpf_map_lookup_elem(&minded, client) : 0;

	return (until && *until > bpf_ktime_get_ns()) || bpf_map_lookup_elem(&strangers, &network);
}

/* A query that comes in: the priority that it gets if it begins a flow, or is of one that did. */
static __always_inline int ask(struct __sk_buff *skb, struct packet *p)
{
	struct end client;
	struct query new, *q;
	struct exchange *e;
	u32 only = 0;

	if (p->proto != IPPROTO_UDP || p->dport != bpf_htons(DNS_PORT))
		return 0;
	if (p->size > LONGEST_QUERY || p->ttl < 2 || skb->gso_segs > 1)
		return 0;

	struct learning *l = bpf_map_lookup_elem(&learning, &only);

	set(&client.addr, p->src);
	client.port = p->sport;
	set(&new.asked, p->dst);
	new.waiting = 1;
	if (!l || !bpf_map_lookup_elem(&hosts, &new.asked) || is_stranger(l, &client))
		return 0;
	new.server = l->server;
	e = reserve();
	if (!e)
		return 0;
	if (bpf_map_update_elem(&queries, &client, &new, BPF_NOEXIST)) {
		q = bpf_map_lookup_elem(&queries, &client);
		if (!q || v4_of(&q->asked) != p->dst || q->server.v4 != new.server.v4) {
			bpf_ringbuf_discard(e, BPF_RB_NO_WAKEUP);
			return 0;
		}
		__sync_fetch_and_add(&q->waiting, 1);
	}
	submit(e, 0, p->size, p->src, p->dst, p->sport, p->dport);
	count(STEPS + U12, 1);
	return l->priority;
}

/* The query that this answers; 0: there is none. */
static __always_inline struct query *answered(struct __sk_buff *skb, struct packet *p, struct end *client)
{
	struct query *q;

	if (p->proto != IPPROTO_UDP || p->sport != bpf_htons(DNS_PORT) || skb->gso_segs > 1)
		return 0;
	set(&client->addr, p->dst);
	client->port = p->dport;
	q = bpf_map_lookup_elem(&queries, client);
	return q && v4_of(&q->server) == p->src ? q : 0;
}

static __always_inline int answer(struct __sk_buff *skb, const u32 link, struct packet *p)
{
	struct end client;
	struct query *q = answered(skb, p, &client);

	if (!q)
		return 0;

	u32 asked = v4_of(&q->asked);
	struct exchange *e = reserve();

	if (__sync_fetch_and_add(&q->waiting, -1) <= 1)
		bpf_map_delete_elem(&queries, &client);
	if (e)
		submit(e, 1, p->size, p->dst, asked, p->dport, p->sport);
	else
		count(LOST, 1);
	count(STEPS + U34, 1);
	set_address(skb, link, IPPROTO_UDP, offsetof(struct iphdr, saddr), p->src, asked);
	return 1;
}

static __always_inline void apply(struct __sk_buff *skb, const u32 link, struct packet *p, struct rewrite *r)
{
	u64 src = v4_of(&r->src), dst = v4_of(&r->dst);	/* read before the packet is written to */
	u64 sport = r->sport, dport = r->dport;

	set_address(skb, link, p->proto, offsetof(struct iphdr, saddr), p->src, src);
	set_address(skb, link, p->proto, offsetof(struct iphdr, daddr), p->dst, dst);
	set_port(skb, link, p->proto, 0, p->sport, sport);
	set_port(skb, link, p->proto, 2, p->dport, dport);
}

/* What is to become of it; 0: that is for the worker to say. */
static __always_inline struct rewrite *decided(struct packet *p, struct rewrite_key *key)
{
	if (!is_used(p->proto, p->dport) && !is_used(p->proto, p->sport))
		return 0;
	fill(key, p);

	struct rewrite *r = bpf_map_lookup_elem(&rewrites, key);

	if (!r || (r->flags & ONE_DSCP && (p->tos ^ r->tos) & 0xfc))
		return 0;
	if ((p->flags & r->mask) == r->value)
		return r;
	if (r->flags & RELAYS_OWN) {
		if ((p->flags & (FIN | SYN | RST)) == FIN)
			return r;
		if ((p->flags & (FIN | SYN | RST | ACK)) == SYN &&
		    (r->flags & MAY_BEGIN || (r->flags & HAS_BEGUN && r->began == p->seq)))
			return r;
	}
	return 0;
}

static __always_inline int incoming(struct __sk_buff *skb, const u32 link)
{
	struct packet p;
	struct rewrite_key key;
	struct end client;
	u32 learnt;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || !load(skb, link, &p))
		return TC_ACT_UNSPEC;

	struct rewrite *r = decided(&p, &key);

	skb->tc_index = CAME_WHOLE;
	if (r && !(r->flags & OUTGOING)) {
		skb->priority = REWRITTEN;
		note(skb, link, &p, r);
		apply(skb, link, &p, r);
	} else if (!r && (learnt = ask(skb, &p))) {
		skb->priority = learnt;
	} else if (!r && answered(skb, &p, &client)) {
		skb->priority = REWRITTEN;	/* it is where it goes out: no rule need look at it here */
	}
	return TC_ACT_UNSPEC;
}

static __always_inline int outgoing(struct __sk_buff *skb, const u32 link)
{
	struct packet p;
	struct rewrite_key key;

	if (!(skb->mark & MARKED))
		return TC_ACT_UNSPEC;
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || !load(skb, link, &p))
		return TC_ACT_UNSPEC;

	if (answer(skb, link, &p)) {
		skb->mark &= ~MARKED;
		return TC_ACT_UNSPEC;
	}

	struct rewrite *r = decided(&p, &key);

	if (!r || !(r->flags & OUTGOING))
		return TC_ACT_UNSPEC;	/* perhaps another krelay's */
	skb->mark &= ~MARKED;
	u32 begins = (p.flags & (SYN | ACK)) == SYN;	/* with ACK it answers a client, or both begin */

	if (r->flags & RELAYS_OWN && (begins || p.flags & FIN)) {
		if (begins && r->flags & MAY_BEGIN) {
			r->began = p.seq;
			r->flags = (r->flags & ~MAY_BEGIN) | HAS_BEGUN;
		}
		tell(&key, r, &p);
	}
	note(skb, link, &p, r);
	apply(skb, link, &p, r);
	return TC_ACT_UNSPEC;
}

/* A match of xt_bpf: the packet begins with the head of IP, and leaves by `ifindex`. */
SEC("socket/passes") int passes(struct __sk_buff *skb)
{
	struct packet p;
	struct rewrite_key key;
	u32 link = skb->ifindex, *most = bpf_map_lookup_elem(&links, &link);

	if (!most || !load(skb, 0, &p))
		return 0;

	struct end client;
	struct query *q = answered(skb, &p, &client);
	struct rewrite *r = q ? 0 : decided(&p, &key);

	if (!q && (!r || !(r->flags & OUTGOING)))
		return 0;
	if (!p.may_be_cut)
		return 1;
	return ((r && r->flags & RELAYS_OWN) || skb->tc_index == CAME_WHOLE) && longest(skb, &p) <= *most;
}

SEC("tc/in_ethernet") int in_ethernet(struct __sk_buff *skb) { return incoming(skb, ETH_HLEN); }
SEC("tc/out_ethernet") int out_ethernet(struct __sk_buff *skb) { return outgoing(skb, ETH_HLEN); }
SEC("tc/in_ip") int in_ip(struct __sk_buff *skb) { return incoming(skb, 0); }
SEC("tc/out_ip") int out_ip(struct __sk_buff *skb) { return outgoing(skb, 0); }
char _license[] SEC("license") = "Dual MIT/GPL";
