#!/usr/bin/env bash
#
# Linux (seen on 6.18.44, x86-64): splice() from TCP fills a pipe of 65,536 bytes with 16 bytes, or with more than 65,536.
#
# Guess: a pipe of 65,536 bytes takes as many, and EAGAIN from a non-blocking splice() means that the socket is empty.
# Seen: a pipe has 16 slots, and each segment that came by itself takes one, however short.  After 16 keystrokes the pipe is
# full; the 17th gives EAGAIN although the socket can be read, so a relay that waits for the socket then spins, or stalls.
# Of a bulk transfer a slot takes whole fragments (up to 32 KB), and far more than F_GETPIPE_SZ go in.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/splice.c" <<'C'
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int from, to;

static void connected(void)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof at;
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	bind(listener, (struct sockaddr *)&at, sizeof at);
	listen(listener, 1);
	getsockname(listener, (struct sockaddr *)&at, &length);
	to = socket(AF_INET, SOCK_STREAM, 0);
	connect(to, (struct sockaddr *)&at, sizeof at);
	setsockopt(to, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	from = accept4(listener, 0, 0, SOCK_NONBLOCK);
	close(listener);
}

int main(void)
{
	int small[2], large[2];
	char byte = 'x', block[65536];
	struct pollfd readable = {0, POLLIN, 0};
	ssize_t given, keys = 0, bulk = 0;

	connected();
	pipe2(small, O_NONBLOCK);
	readable.fd = from;
	do {
		if (write(to, &byte, 1) != 1 || poll(&readable, 1, 1000) != 1)
			return 1;
		given = splice(from, 0, small[1], 0, 65536, SPLICE_F_NONBLOCK);
		keys += given > 0 ? given : 0;
	} while (given > 0 && keys < 100000);
	int why = errno, ready = poll(&readable, 1, 0);
	printf("pipe of %d bytes: %zd bytes sent one by one, then %s; socket readable: %d\n",
	       fcntl(small[1], F_GETPIPE_SZ), keys, strerror(why), ready);

	connected();
	pipe2(large, O_NONBLOCK);
	memset(block, 'y', sizeof block);
	fcntl(to, F_SETFL, O_NONBLOCK);
	readable.fd = from;
	for (int idle = 0; idle < 20;) {
		ssize_t sent = write(to, block, sizeof block);
		idle = sent > 0 ? 0 : idle + 1;
		usleep(idle ? 10000 : 0);
	}
	while ((given = splice(from, 0, large[1], 0, 1 << 20, SPLICE_F_NONBLOCK)) > 0)
		bulk += given;
	printf("pipe of %d bytes: %zd bytes of a bulk transfer\n", fcntl(large[1], F_GETPIPE_SZ), bulk);
	return !(keys < 64 && why == EAGAIN && ready == 1 && bulk > 65536);
}
C
gcc -O1 -Wall -Wno-unused-result -o "$work/splice" "$work/splice.c"
uname -r
unshare -n sh -c 'ip link set lo up && exec "$1"' sh "$work/splice"
