// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * kucomms in C, over the device: kucomms/channel.h, used as kucomms/client.h
 * uses it, which knows shm:// only. Once with a copy into the ring and out of it,
 * and once in place, in two kinds: they differ in what the kernel's side does.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <kucomms/channel.h>

#include "user.h"

#define BATCH	64	/* messages of which the other side is told at once, in place */

static struct kucomms_channel channel;
static int device;

static int ring(void)
{
	return ioctl(device, KUCOMMS_IOC_KICK) ? -errno : 0;
}

static int open_device(const char *path)
{
	struct kucomms_setup setup = { .version = KUCOMMS_ABI_VERSION };
	int err;

	device = open(path, O_RDWR | O_CLOEXEC);
	if (device < 0 || ioctl(device, KUCOMMS_IOC_SETUP, &setup))
		return -errno;
	err = kucomms_channel_init(&channel, 1, setup.ring_size, setup.features, device,
				   (uint64_t)setup.side_offset[1]);
	if (err)
		return err;
	return kucomms_channel_attach(&channel, device, (uint64_t)setup.side_offset[0]);
}

static int default_open(void)
{
	return open_device("/dev/" KBENCH_ENDPOINT);
}

static int in_place_open(void)
{
	return open_device("/dev/" KBENCH_IN_PLACE);
}

static int copying_send(uint64_t first, uint32_t count)
{
	uint64_t number;
	int err;

	for (number = first; number < first + count; number++) {
		fill(buffer, number);
		err = kucomms_channel_send(&channel, buffer, KBENCH_SIZE, 0, 0, 0, 0);
		if (err == 1)
			err = ring();
		if (err)
			return err;
	}
	return 0;
}

/* We are the only thread that sends, so there is no lock to be taken. */
static int in_place_send(uint64_t first, uint32_t count)
{
	struct kucomms_frame *frame;
	uint32_t i;
	int err;

	for (i = 0; i < count; i++) {
		err = kucomms_ring_next(&channel.tx, KBENCH_SIZE, &frame);
		if (err)
			return err;
		frame->type = 0;
		frame->id = 0;
		frame->user_value = 0;
		fill((uint64_t *)(frame + 1), first + i);
		kucomms_ring_publish(&channel.tx, frame, KBENCH_SIZE, 0,
				     KUCOMMS_KIND_MESSAGE);
		if ((i % BATCH == BATCH - 1 || i == count - 1) &&
		    kucomms_channel_publish(&channel))
			err = ring();
		if (err)
			return err;
	}
	return 0;
}

static int wait_first(uint64_t first)
{
	struct kucomms_wait wait = {
		.events = KUCOMMS_WAIT_DATA,
		.timeout_ns = 10000000000LL,
	};

	(void)first;
	if (kucomms_channel_park_rx(&channel))
		return -EBUSY;	/* a message before we slept: the bench is wrong */
	return ioctl(device, KUCOMMS_IOC_WAIT, &wait) ? -errno : 0;
}

/* The kernel sends in its callback: have it called. */
static int ask_and_wait_first(uint64_t first)
{
	int err = kucomms_channel_send(&channel, NULL, 0, 0, 0, 0, 0);

	if (err == 1)
		err = ring();
	return err ? err : wait_first(first);
}

static int copying_receive(uint64_t first, uint32_t count)
{
	struct kucomms_view view;
	uint32_t i;
	int err = 0;

	for (i = 0; !err && i < count; i++) {
		err = kucomms_channel_peek(&channel, &view);
		if (err)
			return err;
		if (view.length != KBENCH_SIZE)
			return -EBADMSG;
		memcpy(buffer, view.data, KBENCH_SIZE);
		if (!good(buffer, first + i))
			return -EBADMSG;
		kucomms_channel_advance(&channel, &view);
		err = kucomms_channel_release(&channel) ? ring() : 0;
	}
	return err;
}

static int in_place_receive(uint64_t first, uint32_t count)
{
	struct kucomms_view view;
	uint32_t i;
	int err = 0;

	for (i = 0; !err && i < count; i++) {
		err = kucomms_channel_peek(&channel, &view);
		if (err)
			return err;
		if (view.length != KBENCH_SIZE || !good((const uint64_t *)view.data, first + i))
			return -EBADMSG;
		kucomms_channel_advance(&channel, &view);
		if ((i % BATCH == BATCH - 1 || i == count - 1) &&
		    kucomms_channel_release(&channel))
			err = ring();
	}
	return err;
}

const struct mechanism kucomms = {
	.name = "kucomms",
	.number = KBENCH_M_KUCOMMS,
	.open = default_open,
	.send = in_place_send,
	.wait = wait_first,
	.receive = in_place_receive,
};

const struct mechanism kucomms_in_place = {
	.name = "kucomms-in-place",
	.number = KBENCH_M_KUCOMMS_IN_PLACE,
	.open = in_place_open,
	.send = in_place_send,
	.wait = ask_and_wait_first,
	.receive = in_place_receive,
};

const struct mechanism kucomms_copied = {
	.name = "kucomms-copied",
	.number = KBENCH_M_KUCOMMS_COPIED,
	.open = default_open,
	.send = copying_send,
	.wait = wait_first,
	.receive = copying_receive,
};
