#!/usr/bin/env bash
#
# Linux (seen on 6.18.44, x86-64): ptrace reads the extended registers into a short buffer, but takes them back whole only.
#
# Guess: PTRACE_GETREGSET and PTRACE_SETREGSET are a pair; what one gave without a complaint the other takes back.
# Seen: for NT_X86_XSTATE, GETREGSET fills a buffer that is shorter than the processor's area, cuts the rest and succeeds;
# SETREGSET of the same bytes fails with EFAULT, as for a bad address (xstateregs_set in arch/x86/kernel/fpu/regset.c wants
# the full size).  So a tracer with a buffer of a fixed size, as User-Mode Linux 6.1 has, works on one processor, and on one
# with larger registers (AMX: 11,008 bytes) its tracees are killed.

set -euo pipefail
[ "$(uname -m)" = x86_64 ] || { echo "x86-64 only; nothing was tried"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/xstate.c" <<'C'
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

static char area[1 << 16];

int main(void)
{
	pid_t child = fork();
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(0);
	}
	waitpid(child, 0, 0);
	struct iovec whole = {area, sizeof area};
	if (ptrace(PTRACE_GETREGSET, child, (void *)NT_X86_XSTATE, &whole))
		return 1;
	struct iovec some = {area, whole.iov_len - 8};
	int read = ptrace(PTRACE_GETREGSET, child, (void *)NT_X86_XSTATE, &some);
	size_t given = some.iov_len;
	errno = 0;
	int written = ptrace(PTRACE_SETREGSET, child, (void *)NT_X86_XSTATE, &some);
	int why = errno;
	int back = ptrace(PTRACE_SETREGSET, child, (void *)NT_X86_XSTATE, &whole);
	printf("%zu bytes in all; 8 fewer: read %d (%zu bytes), written back %d (%s); all written back %d\n",
	       whole.iov_len, read, given, written, why == EFAULT ? "EFAULT" : "another error", back);
	kill(child, SIGKILL);
	waitpid(child, 0, 0);
	return !(read == 0 && given == whole.iov_len - 8 && written == -1 && why == EFAULT && back == 0);
}
C
gcc -O1 -o "$work/xstate" "$work/xstate.c"
uname -r
"$work/xstate"
