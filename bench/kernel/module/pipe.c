// SPDX-License-Identifier: GPL-2.0-only
/* A pipe of the user's, whose other end the kernel reads or writes. */

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/module.h>

#include "internal.h"

static struct file *pipe;

static int send_burst(u64 first, u32 count)
{
	ssize_t result;
	u64 number;

	for (number = first; number < first + count; number++) {
		kbench_fill(kbench_buffer, number, kbench_run.start.full);
		result = kernel_write(pipe, kbench_buffer, KBENCH_SIZE, NULL);
		if (result != KBENCH_SIZE)
			return result < 0 ? result : -EIO;
	}
	return 0;
}

static int receive_burst(u64 first, u32 count)
{
	ssize_t result;
	u64 number;

	for (number = first; number < first + count; number++) {
		result = kernel_read(pipe, kbench_buffer, KBENCH_SIZE, NULL);
		if (result != KBENCH_SIZE)
			return result < 0 ? result : -EIO;
		if (!kbench_check(kbench_buffer, number))
			return -EBADMSG;
	}
	return 0;
}

static int receive_first(u64 number)
{
	return receive_burst(number, 1);
}

static int start(const struct kbench_start *start)
{
	fmode_t mode = start->direction == KBENCH_TO_USER ? FMODE_WRITE : FMODE_READ;

	pipe = fget(start->fd);
	if (!pipe)
		return -EBADF;
	if (pipe->f_mode & mode)
		return 0;
	fput(pipe);
	pipe = NULL;
	return -EBADF;
}

static void stop(void)
{
	fput(pipe);
	pipe = NULL;
}

const struct kbench_mechanism kbench_pipe = {
	.start = start,
	.stop = stop,
	.send = send_burst,
	.first = receive_first,
	.receive = receive_burst,
};
