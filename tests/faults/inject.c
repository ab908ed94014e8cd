// SPDX-License-Identifier: MIT
/*
 * Cuts another process at a chosen point, by ptrace: before its n-th system
 * call or after its n-th instruction, counted from a mark; or makes a system
 * call fail. A shared library for injector.py, which calls all of it for one
 * process from one thread.
 *
 * A mark is kill(getpid(), SIGTRAP) by the process itself. Functions return
 * what their comment says, or a negative errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

#ifndef __x86_64__
#error "written for x86-64: the registers of a system call"
#endif

#define SYSCALL_STOP	(SIGTRAP | 0x80)

/* Where the process stands. */
enum place {
	AT_END = 0,	/* it has ended, and was reaped */
	AT_MARK = 1,
	AT_POINT = 2,	/* an instruction, or the entry of a system call */
};

struct call {
	int64_t number;
	uint64_t arguments[6];
};

/* Those of the mark itself. */
static int of_mark(int64_t number)
{
	return number == SYS_getpid || number == SYS_kill;
}

/* What is counted by itself: a number, and for epoll_ctl with its operation. */
static int64_t kind_of(const struct user_regs_struct *registers)
{
	int64_t kind = (int64_t)registers->orig_rax;

	return kind == SYS_epoll_ctl ?
	       kind | (int64_t)registers->rsi << 32 : kind;
}

/* The status at which @pid stops or ends next. */
static int wait_for(int pid, int *status)
{
	while (waitpid(pid, status, __WALL) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/*
 * Let it run, by @request, until it meets something of ours. Signals of others
 * are passed on, stops of the whole process are not heeded.
 */
static int go_on(int request, int pid)
{
	int err, number, signal = 0, status;
	siginfo_t info;

	for (;;) {
		if (ptrace(request, pid, 0, signal))
			return errno == ESRCH ? wait_for(pid, &status) : -errno;
		err = wait_for(pid, &status);
		if (err)
			return err;
		if (!WIFSTOPPED(status))
			return AT_END;
		number = WSTOPSIG(status);
		if (number == SYSCALL_STOP)
			return AT_POINT;
		signal = 0;
		if (status >> 16)
			continue;
		if (number != SIGTRAP) {
			signal = number;
			continue;
		}
		if (ptrace(PTRACE_GETSIGINFO, pid, 0, &info))
			return -errno;
		return info.si_code == SI_USER ? AT_MARK : AT_POINT;
	}
}

/* Return: 0. It stands still. */
int faults_seize(int pid)
{
	int status;
	cpu_set_t one;

	/*
	 * Both on one processor: to wake the other one up at each step, out of
	 * its idle state, takes ten times as long on a virtual machine.
	 */
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	if (sched_setaffinity(0, sizeof(one), &one) ||
	    sched_setaffinity(pid, sizeof(one), &one))
		return -errno;
	if (ptrace(PTRACE_SEIZE, pid, 0,
		   PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL) ||
	    ptrace(PTRACE_INTERRUPT, pid, 0, 0))
		return -errno;
	return wait_for(pid, &status);
}

/* Return: AT_MARK or AT_END. */
int faults_run(int pid)
{
	return go_on(PTRACE_CONT, pid);
}

/*
 * Run to the entry of the @count-th system call of this kind, of any for -1.
 * Those seen on the way go to @calls, as far as there is room; @seen: how many.
 * Return: AT_POINT, AT_MARK, AT_END.
 */
int faults_to_call(int pid, int64_t number, int64_t count, struct call *calls,
		   int64_t room, int64_t *seen)
{
	struct user_regs_struct registers;
	int place;

	*seen = 0;
	for (;;) {
		place = go_on(PTRACE_SYSCALL, pid);
		if (place != AT_POINT)
			return place;
		if (ptrace(PTRACE_GETREGS, pid, 0, &registers))
			return -errno;
		if (!of_mark((int64_t)registers.orig_rax)) {
			if (*seen < room)
				calls[*seen] = (struct call){
					kind_of(&registers),
					{ registers.rdi, registers.rsi,
					  registers.rdx, registers.r10,
					  registers.r8, registers.r9 },
				};
			++*seen;
			if ((number < 0 ||
			     number == kind_of(&registers)) && !--count)
				return AT_POINT;
		}
		place = go_on(PTRACE_SYSCALL, pid);	/* its exit */
		if (place != AT_POINT)
			return place;
	}
}

/*
 * At the entry of a system call: it shall not be made, and give @result.
 * Return: AT_POINT or AT_END.
 */
int faults_answer(int pid, int64_t result)
{
	struct user_regs_struct registers;
	int place;

	if (ptrace(PTRACE_GETREGS, pid, 0, &registers))
		return -errno;
	registers.orig_rax = (unsigned long long)-1;
	if (ptrace(PTRACE_SETREGS, pid, 0, &registers))
		return -errno;
	place = go_on(PTRACE_SYSCALL, pid);
	if (place != AT_POINT)
		return place;
	if (ptrace(PTRACE_GETREGS, pid, 0, &registers))
		return -errno;
	registers.rax = (unsigned long long)result;
	return ptrace(PTRACE_SETREGS, pid, 0, &registers) ? -errno : AT_POINT;
}

/* Run up to @address. Return: AT_POINT, AT_MARK, AT_END. */
static int run_to(int pid, uint64_t address)
{
	struct user_regs_struct registers;
	long word;
	int place;

	errno = 0;
	word = ptrace(PTRACE_PEEKTEXT, pid, address, 0);
	if (errno || ptrace(PTRACE_POKETEXT, pid, address,
			    (word & ~0xffL) | 0xcc))
		return -errno;
	place = go_on(PTRACE_CONT, pid);
	if (place == AT_END || place < 0)
		return place;
	if (ptrace(PTRACE_POKETEXT, pid, address, word))
		return -errno;
	if (place == AT_MARK)
		return place;
	if (ptrace(PTRACE_GETREGS, pid, 0, &registers))
		return -errno;
	registers.rip = address;
	return ptrace(PTRACE_SETREGS, pid, 0, &registers) ? -errno : AT_POINT;
}

/*
 * Make @count steps of one instruction; where @high is not 0, only those in
 * @low to @high are counted. @entry: 0, or the address of the first of them,
 * to get there faster; is set. @made: how many were counted.
 * Return: AT_POINT, AT_MARK, AT_END.
 */
int faults_step(int pid, int64_t count, uint64_t low, uint64_t high,
		uint64_t *entry, int64_t *made)
{
	uint64_t address = 0;
	int place;

	*made = 0;
	if (*entry) {
		place = run_to(pid, *entry);
		if (place != AT_POINT)
			return place;
	}
	while (*made < count) {
		if (high) {
			errno = 0;
			address = (uint64_t)ptrace(PTRACE_PEEKUSER, pid,
				offsetof(struct user, regs.rip), 0);
			if (errno)
				return -errno;
		}
		place = go_on(PTRACE_SINGLESTEP, pid);
		if (place != AT_POINT)
			return place;
		if (high && (address < low || address >= high))
			continue;
		if (!*entry)
			*entry = address;
		++*made;
	}
	return AT_POINT;
}

/* Wait for the end of one that was killed. Return: AT_END. */
int faults_reap(int pid)
{
	int err, status;

	do {
		err = wait_for(pid, &status);
		if (err)
			return err;
	} while (WIFSTOPPED(status));
	return AT_END;
}

/* Return: 0. It goes on by itself. */
int faults_let_go(int pid)
{
	return ptrace(PTRACE_DETACH, pid, 0, 0) ? -errno : 0;
}
