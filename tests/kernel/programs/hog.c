// SPDX-License-Identifier: MIT
/*
 * Takes all that a device gives, and keeps it: pairs of a letter and a device, in
 * this order,
 *
 *	r	channels with the largest rings
 *	t	channels with the smallest rings
 *	p	channels with the smallest rings, and pools in them, larger first
 *
 * each until it is refused. For each it prints how many it has got and the errno
 * that ended it. Then it waits for the end of its input.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kucomms.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define LARGEST	(16 << 20)

/* A channel, or -errno. */
static int set_up(const char *device, unsigned long long ring_size)
{
	struct kucomms_setup setup;
	int fd = open(device, O_RDWR), err;

	if (fd < 0)
		return -errno;
	memset(&setup, 0, sizeof(setup));
	setup.version = KUCOMMS_ABI_VERSION;
	setup.features = KUCOMMS_FEATURE_POOLS;
	setup.ring_size = ring_size;
	if (!ioctl(fd, KUCOMMS_IOC_SETUP, &setup))
		return fd;
	err = -errno;
	close(fd);
	return err;
}

/* Fill a channel with pools. Return: how many, the errno in @err. */
static int open_pools(int fd, int *err)
{
	struct kucomms_pool_request request;
	unsigned long long size = 64ULL << 20;
	int count = 0;

	while (size >= 4096) {
		memset(&request, 0, sizeof(request));
		request.size = size;
		if (!ioctl(fd, KUCOMMS_IOC_OPEN_POOL, &request)) {
			count++;
			continue;
		}
		*err = errno;
		if (*err == EMFILE)
			break;
		size /= 4;
	}
	return count;
}

static void take(char what, const char *device)
{
	int count = 0, pools = 0, here, fd, err = 0;

	for (;;) {
		fd = set_up(device, what == 'r' ? LARGEST : 4096);
		if (fd < 0) {
			err = -fd;
			break;
		}
		count++;
		if (what != 'p')
			continue;
		here = open_pools(fd, &err);
		pools += here;
		if (err != EMFILE)
			break;
	}
	printf("%c %d %d\n", what, what == 'p' ? pools : count, err);
}

int main(int argc, char **argv)
{
	struct rlimit most;
	char byte;
	int i;

	getrlimit(RLIMIT_NOFILE, &most);
	most.rlim_cur = most.rlim_max;
	setrlimit(RLIMIT_NOFILE, &most);
	for (i = 1; i + 1 < argc; i += 2)
		take(argv[i][0], argv[i + 1]);
	printf("all\n");
	fflush(stdout);
	return read(0, &byte, 1);
}
