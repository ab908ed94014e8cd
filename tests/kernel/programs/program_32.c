// SPDX-License-Identifier: MIT
/*
 * A program of 32 bits that uses a device of a kernel of 64; without a C
 * library, which not every machine has for 32 bits. Exits with 0, or with the
 * number of the step that went wrong.
 */
#include <linux/kucomms.h>

static long call(long n, long a, long b, long c, long d, long e, long f)
{
	static long six;
	long result;

	six = f;
	__asm__ volatile("push %%ebp; mov %[six], %%ebp; int $0x80; pop %%ebp"
		: "=a" (result)
		: "a" (n), "b" (a), "c" (b), "d" (c), "S" (d), "D" (e), [six] "m" (six)
		: "memory");
	return result;
}

#define EXPECT(what) do { step++; if (!(what)) call(1, step, 0, 0, 0, 0, 0); } while (0)
#define PAGE 4096
#define READ64(at) (*(volatile __u64 *)(at))

static struct kucomms_setup setup;
static struct kucomms_wait wait;
static const char path[] = "/dev/kucomms_test_quiet";

void _start(void)
{
	unsigned char *own, *kernel;
	int step = 0;
	long fd = call(5, (long)path, 2, 0, 0, 0, 0);

	EXPECT(fd >= 0);
	EXPECT(call(54, fd, KUCOMMS_IOC_KICK, 0, 0, 0, 0) == -107);
	EXPECT(call(54, fd, KUCOMMS_IOC_SETUP, 8, 0, 0, 0) == -14);
	EXPECT(call(54, fd, KUCOMMS_IOC_SETUP, (long)&setup, 0, 0, 0) == -93);
	EXPECT(setup.version == 1);
	EXPECT(call(54, fd, KUCOMMS_IOC_SETUP + 1, (long)&setup, 0, 0, 0) == -25);
	setup.ring_size = PAGE;
	setup.features = KUCOMMS_FEATURE_POOLS;
	EXPECT(call(54, fd, KUCOMMS_IOC_SETUP, (long)&setup, 0, 0, 0) == 0);
	EXPECT(setup.features == 0);	/* no pools for 32 bits */
	EXPECT(setup.ring_size == PAGE && setup.page_size == PAGE);
	EXPECT(setup.side_size == 4 * PAGE && setup.side_offset[1] == 4 * PAGE);
	kernel = (unsigned char *)call(192, 0, 4 * PAGE, 1, 1, fd, 0);
	EXPECT((unsigned long)kernel < -4096UL);
	EXPECT(call(192, 0, 4 * PAGE, 3, 1, fd, 0) == -13);
	own = (unsigned char *)call(192, 0, 4 * PAGE, 3, 1, fd, 4);
	EXPECT((unsigned long)own < -4096UL);
	wait.events = KUCOMMS_WAIT_DATA;
	EXPECT(call(54, fd, KUCOMMS_IOC_WAIT, (long)&wait, 0, 0, 0) == -110);
	READ64(own + 2 * PAGE + 128) = 1;	/* park for data */
	READ64(own + 3 * PAGE) = 0;		/* an empty message of type 0 */
	READ64(own + 3 * PAGE + 16) = 0x123456789abcdefULL;
	READ64(own + PAGE) = 32;
	EXPECT(call(54, fd, KUCOMMS_IOC_KICK, 0, 0, 0, 0) == 0);
	wait.timeout_ns = 60000000000LL;
	EXPECT(call(54, fd, KUCOMMS_IOC_WAIT, (long)&wait, 0, 0, 0) == 0);
	EXPECT(wait.events == KUCOMMS_WAIT_DATA);
	EXPECT(READ64(kernel + PAGE) == 32);
	EXPECT(READ64(kernel + 3 * PAGE + 16) == 0x123456789abcdefULL);
	call(1, 0, 0, 0, 0, 0, 0);
	for (;;)
		;
}
