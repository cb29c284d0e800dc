/*
 * Preloaded (ld.so(8)) into a program that traces others: makes it fare as a User-Mode Linux does
 * on a processor with AMX, on one that has none.
 *
 * With AMX defined, NT_X86_XSTATE has 11,008 bytes, those beyond the real ones zero, and writing
 * less is refused, as the kernel does it. Without, the program has room for 8 bytes less than there
 * are, and it is the kernel itself that refuses to write these.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

static long (*next)(enum __ptrace_request, ...);

__attribute__((constructor)) static void find_next(void)
{
	next = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
}

#ifdef AMX
enum { ALL = 11008 };

static long exchange(enum __ptrace_request request, pid_t pid, void *addr, struct iovec *room)
{
	static unsigned char registers[ALL];
	struct iovec real = { registers, sizeof registers };

	memset(registers, 0, sizeof registers);
	if (next(PTRACE_GETREGSET, pid, addr, &real) < 0)
		return -1;
	if (room->iov_len > ALL)
		room->iov_len = ALL;
	if (request == PTRACE_GETREGSET) {
		memcpy(room->iov_base, registers, room->iov_len);
		return 0;
	}
	if (room->iov_len < ALL) {
		errno = EFAULT;
		return -1;
	}
	memcpy(registers, room->iov_base, real.iov_len);
	return next(request, pid, addr, &real);
}
#else
static long exchange(enum __ptrace_request request, pid_t pid, void *addr, struct iovec *room)
{
	static unsigned char registers[1 << 16];
	struct iovec real = { registers, sizeof registers };

	if (next(PTRACE_GETREGSET, pid, addr, &real) < 0)
		return -1;
	if (room->iov_len > real.iov_len - 8)
		room->iov_len = real.iov_len - 8;
	return next(request, pid, addr, room);
}
#endif

long ptrace(enum __ptrace_request request, ...)
{
	va_list arguments;

	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *addr = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	if ((request == PTRACE_GETREGSET || request == PTRACE_SETREGSET) && addr == (void *)NT_X86_XSTATE)
		return exchange(request, pid, addr, data);
	return next(request, pid, addr, data);
}
