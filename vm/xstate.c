/*
 * Preloaded (ld.so(8)) into a User-Mode Linux that doesn't know all registers of this machine's
 * processor.
 *
 * User-Mode Linux runs its programs by ptrace(2), and with each switch between them puts back their
 * floating-point and vector registers as it has read them: PTRACE_SETREGSET of NT_X86_XSTATE
 * (restore_fp_registers in arch/x86/um/os-Linux/registers.c). Linux 6.1 has room for 2,696 bytes of
 * them, enough for AVX-512; a processor with AMX has 11,008. Reading gives what there is room for,
 * but writing less than all is refused (EFAULT; xstateregs_set in arch/x86/kernel/fpu/regset.c),
 * and the program, the very first one, is killed by SIGSEGV.
 *
 * So what is written is made whole here, with what the program has in the registers beyond. Those
 * are not switched between threads of one program. They are AMX's tiles, which a program must ask
 * its kernel for (arch_prctl, ARCH_REQ_XCOMP_PERM); a User-Mode Linux gives them to none.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
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

long ptrace(enum __ptrace_request request, ...)
{
	/* Not on the stack, which may be one of a User-Mode Linux's own, of 16 KB. It has one thread. */
	static unsigned char registers[1 << 16];
	struct iovec whole = { registers, sizeof registers };
	va_list arguments;

	va_start(arguments, request);
	pid_t pid = va_arg(arguments, pid_t);
	void *addr = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);

	if (request == PTRACE_SETREGSET && addr == (void *)NT_X86_XSTATE) {
		const struct iovec *known = data;

		if (next(PTRACE_GETREGSET, pid, addr, &whole) == 0 && known->iov_len < whole.iov_len) {
			memcpy(registers, known->iov_base, known->iov_len);
			return next(request, pid, addr, &whole);
		}
	}
	return next(request, pid, addr, data);
}
