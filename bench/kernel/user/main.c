// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * The user's side: kbench MECHANISM to-kernel|to-user BURSTS COUNT full|stamps BPF-FILE
 *
 * Makes BURSTS bursts of COUNT messages and prints what each side took, as one
 * line of JSON. What is before the first timed burst warms up.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "user.h"

#define WARM_UP	4	/* bursts */

struct run run;
uint64_t recovered;
uint64_t buffer[KBENCH_WORDS];

static const struct mechanism *const mechanisms[] = {
	&netlink, &netlink_resync, &genetlink, &chardev, &shared,
	&relay, &pipes, &bpf, &kucomms, &kucomms_in_place,
	&kucomms_copied,
};

int wait_readable(int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };

	if (poll(&ready, 1, 10000) < 0)
		return -errno;
	return ready.revents & POLLIN ? 0 : -ETIMEDOUT;
}

static int control(unsigned long command, void *argument)
{
	return ioctl(run.control, command, argument) ? -errno : 0;
}

static int burst(const struct mechanism *mechanism, uint64_t first, uint32_t count,
		 double *user, double *kernel)
{
	struct kbench_burst armed = { .first = first, .count = count };
	int to_user = run.start.direction == KBENCH_TO_USER;
	struct kbench_burst done;
	uint64_t begin, taken;
	int err;

	err = control(KBENCH_IOC_ARM, &armed);
	if (err)
		return err;
	if (to_user) {
		err = mechanism->wait(first);
		if (err)
			return err;
		err = control(KBENCH_IOC_FINISH, &done);
		if (err)
			return err;
	}
	begin = cycles();
	err = to_user ? mechanism->receive(first, count) : mechanism->send(first, count);
	taken = cycles() - begin;
	if (err)
		return err;
	if (!to_user) {
		err = control(KBENCH_IOC_FINISH, &done);
		if (err)
			return err;
		if (done.inside)
			taken -= done.cycles;
	}
	if (done.timed < count - 1)
		return -EBADMSG;
	*user = (double)taken / count;
	*kernel = (double)done.cycles / done.timed;
	return 0;
}

static int compare(const void *a, const void *b)
{
	double difference = *(const double *)a - *(const double *)b;

	return (difference > 0) - (difference < 0);
}

/* The median of the bursts: one of them may have been interrupted for long. */
static double median(double *values, uint32_t number)
{
	qsort(values, number, sizeof(*values), compare);
	return (values[(number - 1) / 2] + values[number / 2]) / 2;
}

static int bursts(const struct mechanism *mechanism, uint32_t number, uint32_t count)
{
	double *user = calloc(WARM_UP + number, sizeof(*user));
	double *kernel = calloc(WARM_UP + number, sizeof(*kernel));
	int err = user && kernel ? 0 : -ENOMEM;
	uint32_t i;

	for (i = 0; !err && i < WARM_UP + number; i++)
		err = burst(mechanism, (uint64_t)i * count, count, &user[i], &kernel[i]);
	if (err) {
		fprintf(stderr, "%s: burst %u: %s\n", mechanism->name, i, strerror(-err));
	} else {
		printf("{\"user_cycles\": %.1f, \"kernel_cycles\": %.1f, ",
		       median(user + WARM_UP, number), median(kernel + WARM_UP, number));
		printf("\"user_least\": %.1f, \"kernel_least\": %.1f, \"recovered\": %llu}\n",
		       user[WARM_UP], kernel[WARM_UP], (unsigned long long)recovered);
	}
	free(user);
	free(kernel);
	return err;
}

static const struct mechanism *find(const char *name)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(mechanisms); i++)
		if (!strcmp(name, mechanisms[i]->name))
			return mechanisms[i];
	return NULL;
}

/* Stay on the first processor, with all memory present. */
static void settle(void)
{
	cpu_set_t first;

	CPU_ZERO(&first);
	CPU_SET(0, &first);
	if (sched_setaffinity(0, sizeof(first), &first))
		perror("sched_setaffinity");
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		perror("mlockall");
}

int main(int argc, char **argv)
{
	const struct mechanism *mechanism = argc == 7 ? find(argv[1]) : NULL;
	int err;

	if (!mechanism) {
		fprintf(stderr, "usage: %s MECHANISM to-kernel|to-user BURSTS COUNT %s BPF-FILE\n",
			argv[0], "full|stamps");
		return 2;
	}
	run.start.mechanism = mechanism->number;
	run.start.direction = strcmp(argv[2], "to-user") ? KBENCH_TO_KERNEL : KBENCH_TO_USER;
	run.start.full = !strcmp(argv[5], "full");
	run.start.fd = -1;
	run.start.lose = run.start.full ? 97 : 0;
	run.bpf = argv[6];
	kbench_fill((__u64 *)buffer, 0, 1);
	run.control = open("/dev/" KBENCH_CONTROL, O_RDWR | O_CLOEXEC);
	if (run.control < 0) {
		perror("/dev/" KBENCH_CONTROL);
		return 1;
	}
	settle();
	err = mechanism->open();
	if (!err)
		err = control(KBENCH_IOC_START, &run.start);
	if (err) {
		fprintf(stderr, "%s: cannot begin: %s\n", mechanism->name, strerror(-err));
		return 1;
	}
	return bursts(mechanism, (uint32_t)atoi(argv[3]), (uint32_t)atoi(argv[4])) ? 1 : 0;
}
