// SPDX-License-Identifier: GPL-2.0-only
/*
 * A camera without a lens: frames of 640 x 480 pixels, 16 bits each, that reach the
 * program without being copied. Each is a buffer of a pool of this module; the
 * program has it mapped, looks at it, and gives it back. A frame for which there is
 * no buffer, because the program still has them all, is dropped and counted.
 *
 *	modprobe kucomms
 *	echo kucomms_camera > /sys/devices/virtual/kucomms/kucomms/create_device
 *	modprobe kucomms_camera rate=30
 *	python examples/camera.py
 *
 * A message has one frame; its id is the frame's number, which counts dropped ones
 * too, its user_value how many were dropped so far, and its data a struct camera_info.
 * So that a program can tell whether a frame is whole, each pixel is the frame's number
 * and its own, added up.
 */
#include <linux/err.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>

#include <kucomms/kucomms.h>

#define CAMERA_WIDTH	640
#define CAMERA_HEIGHT	480
#define CAMERA_FRAME	(CAMERA_WIDTH * CAMERA_HEIGHT * sizeof(u16))
#define CAMERA_BUFFERS	16

static unsigned int rate = 30;
module_param(rate, uint, 0644);
MODULE_PARM_DESC(rate, "frames a second, at most 100");

struct camera_info {
	u32 width;
	u32 height;
	u64 taken_ns;
};

/* One for each program that looks. */
struct camera {
	struct kucomms_pool *pool;
	ktime_t next;
	u64 number;
	u64 dropped;
};

static void camera_expose(u16 *pixels, u64 number)
{
	u32 i;

	for (i = 0; i < CAMERA_WIDTH * CAMERA_HEIGHT; i++)
		pixels[i] = number + i;
}

static int camera_send(struct kucomms_channel *channel, struct camera *camera)
{
	struct camera_info info = {
		.width = CAMERA_WIDTH,
		.height = CAMERA_HEIGHT,
		.taken_ns = ktime_get_ns(),
	};
	struct kucomms_message message = {
		.id = camera->number,
		.user_value = camera->dropped,
		.length = sizeof(info),
		.data = &info,
		.buffer_count = 1,
	};
	struct kucomms_buffer *frame;
	int err;

	frame = kucomms_allocate(camera->pool, CAMERA_FRAME);
	if (IS_ERR(frame))
		return PTR_ERR(frame);
	camera_expose(kucomms_buffer_data(frame), camera->number);
	message.buffers = &frame;
	err = kucomms_send(channel, &message);
	if (err)
		kucomms_free_buffer(frame);
	return err;
}

/* Comes a hundred times a second, and now and then in between. */
static bool camera_work(struct kucomms_channel *channel)
{
	struct camera *camera = kucomms_channel_priv(channel);
	u64 period = NSEC_PER_SEC / clamp(READ_ONCE(rate), 1U, 100U);
	ktime_t now = ktime_get();

	if (ktime_before(now, camera->next))
		return false;
	/* What could not be taken in time is not made up for. */
	camera->next = ktime_add_ns(camera->next, period);
	if (ktime_before(camera->next, now))
		camera->next = ktime_add_ns(now, period);
	if (camera_send(channel, camera))
		camera->dropped++;
	camera->number++;
	return false;
}

static void camera_message(struct kucomms_channel *channel,
			   const struct kucomms_message *message)
{
	/* There is nothing to set. What came with it goes back by itself. */
}

static int camera_open(struct kucomms_channel *channel,
		       const struct kucomms_peer *peer)
{
	struct camera *camera = kzalloc(sizeof(*camera), GFP_KERNEL);
	int err;

	if (!camera)
		return -ENOMEM;
	camera->pool = kucomms_open_pool(channel, CAMERA_BUFFERS * CAMERA_FRAME, 0);
	err = PTR_ERR_OR_ZERO(camera->pool);
	if (err) {
		kfree(camera);
		return err;
	}
	camera->next = ktime_get();
	kucomms_channel_set_priv(channel, camera);
	return 0;
}

static void camera_close(struct kucomms_channel *channel)
{
	kfree(kucomms_channel_priv(channel));	/* the pool goes with the channel */
}

static const struct kucomms_endpoint_ops camera_ops = {
	.size = sizeof(camera_ops),
	.message = camera_message,
	.work = camera_work,
	.open = camera_open,
	.close = camera_close,
};

static struct kucomms_endpoint *camera_endpoint;

static int __init camera_init(void)
{
	static const struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = KUCOMMS_POOLS,
		/* The pools are ours, and nobody else is charged for them. */
		.max_channels = 8,
	};

	camera_endpoint = kucomms_register("kucomms_camera", &camera_ops,
					   &options, NULL);
	return PTR_ERR_OR_ZERO(camera_endpoint);
}

static void __exit camera_exit(void)
{
	kucomms_unregister(camera_endpoint);
}

module_init(camera_init);
module_exit(camera_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms camera: frames in buffers that are handed over");
MODULE_VERSION("0.1.0");
