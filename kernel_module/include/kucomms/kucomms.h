/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kucomms for kernel modules: endpoints that exchange messages with user space.
 *
 * A module registers an endpoint under the name of a device. Each process that
 * connects is a channel. All callbacks of an endpoint run in one kernel thread,
 * one at a time, and may sleep; so what they share needs no lock.
 *
 *	static void my_message(struct kucomms_channel *channel,
 *			       const struct kucomms_message *message)
 *	{
 *		kucomms_reply(channel, message, message->data, message->length);
 *	}
 */
#ifndef _KUCOMMS_H
#define _KUCOMMS_H

#include <linux/kucomms.h>
#include <linux/types.h>
#include <linux/uidgid.h>

struct kucomms_buffer;
struct kucomms_channel;
struct kucomms_endpoint;
struct kucomms_pool;

/**
 * struct kucomms_message - a message
 * @type: the user's, no value reserved
 * @id: the user's, no value reserved
 * @user_value: the user's, no value reserved
 * @length: of @data
 * @flags: KUCOMMS_FLAG_REPLY, KUCOMMS_FLAG_TOKEN or 0
 * @data: @length bytes. What arrives is a private copy, aligned to 8 bytes and
 *	  valid until the callback returns; with KUCOMMS_RX_IN_PLACE it is in
 *	  the ring, where the user can change it at any time, and we cannot, and
 *	  can be held longer, see kucomms_hold().
 * @buffers: @buffer_count of them, that are handed over. What comes with a
 *	     message is the module's while it is in the callback, and is then
 *	     given back, unless it was sent, freed or taken: see
 *	     kucomms_take_buffer()
 * @buffer_count: 0 for none, at most KUCOMMS_CARRIED_MAX
 */
struct kucomms_message {
	u64 type;
	u64 id;
	u64 user_value;
	u32 length;
	u32 flags;
	void *data;
	struct kucomms_buffer **buffers;
	u32 buffer_count;
};

/**
 * struct kucomms_peer - who wants a channel
 * @pid: of the process that has opened the device, in the initial namespace. It
 *	 may have passed the file on, and be gone
 * @uid: the effective user that it had then
 * @hello_length: of @hello
 * @hello: the greeting that it sent
 */
struct kucomms_peer {
	pid_t pid;
	kuid_t uid;
	u32 hello_length;
	const u8 *hello;
};

/**
 * struct kucomms_endpoint_ops - the callbacks of an endpoint
 * @size: sizeof(struct kucomms_endpoint_ops)
 * @message: a message has come
 * @work: 100 times a second for each channel; true: there is more to do, call
 *	  again at once. Optional: an endpoint with neither this nor @timer has
 *	  no timer and does not wake up by itself.
 * @writable: there is room again, after a send to this channel met -EAGAIN.
 *	      Optional.
 * @buffers_available: buffers were given back or freed, after kucomms_allocate()
 *		       met -ENOBUFS. Optional.
 * @timer: once a second for each channel, with ktime_get_ns(). Optional.
 * @open: a process connects. Return 0, or an errno that it gets; instead of
 *	  -EAGAIN, -EINPROGRESS and -EINTR, which mean something else to it, it
 *	  gets EIO. Without memory for its messages, @close follows at once.
 *	  Optional.
 * @close: the channel is gone; the last callback for it. Optional.
 *
 * A tick that comes too late is left out, never made up for. The structure has
 * to live as long as the endpoint.
 */
struct kucomms_endpoint_ops {
	size_t size;
	void (*message)(struct kucomms_channel *channel,
			const struct kucomms_message *message);
	bool (*work)(struct kucomms_channel *channel);
	void (*writable)(struct kucomms_channel *channel);
	void (*buffers_available)(struct kucomms_channel *channel);
	void (*timer)(struct kucomms_channel *channel, u64 now_ns);
	int (*open)(struct kucomms_channel *channel,
		    const struct kucomms_peer *peer);
	void (*close)(struct kucomms_channel *channel);
};

/* A thread for each channel instead of one for all of an endpoint. */
#define KUCOMMS_THREAD_PER_CHANNEL	0x1
/* No copy: message->data is in the ring. Only the header is stable then. */
#define KUCOMMS_RX_IN_PLACE		0x2
/* The channels have numbers; also when none is declared yet. */
#define KUCOMMS_NUMBERED		0x4

/*
 * Only one side of a channel may send, and passes the turn with its message, or
 * with kucomms_pass_turn(). The user begins; a kernel that is to begin waits for
 * the token that he sends first. Sends out of turn fail with -EPERM.
 */
#define KUCOMMS_TURNS			0x8
/* Messages can hand over buffers, and the user can open pools for them. */
#define KUCOMMS_POOLS			0x10

#define KUCOMMS_NUMBERED_MAX		0x100000

/**
 * struct kucomms_endpoint_options - what an endpoint may ask for
 * @size: sizeof(struct kucomms_endpoint_options)
 * @flags: KUCOMMS_THREAD_PER_CHANNEL, KUCOMMS_RX_IN_PLACE, KUCOMMS_NUMBERED,
 *	   KUCOMMS_TURNS, KUCOMMS_POOLS
 * @max_channels: 0 for 1024, UINT_MAX for no limit. With
 *		  KUCOMMS_THREAD_PER_CHANNEL it bounds the threads, too
 * @max_user_channels: of these, what one user can have, by effective user id,
 *		       root as well; 0 for 256, or @max_channels if that is less.
 *		       A channel counts until its close callback has returned
 * @ring_size: bytes of each ring for who does not ask; 0 for 1 MiB
 * @max_ring_size: the most that a user can ask for; 0 for 16 MiB. The shared
 *		   thread's buffer for a message grows up to this, and is charged
 *		   to nobody; that of a channel's own thread is charged to its user
 * @hello_length: of @hello, at most KUCOMMS_HELLO_MAX
 * @hello: greeting to who connects
 * @busy_poll_ns: how long the thread may spin for more messages before it goes to
 *		  sleep, at most; 0 for never. It does so while messages come in
 *		  quick succession, gives way to whatever else wants the
 *		  processor, and spares user space the system call that wakes it
 * @numbered: how many channels there are: 0, 1 ... @numbered - 1. Each user has
 *	      the one that he asks for, or the lowest that is free. More can be
 *	      announced later. 0, without KUCOMMS_NUMBERED: the channels have no
 *	      numbers. More than 1024 need @max_channels, too
 * @max_pool_bytes: what all pools of a channel's user may have, until nothing is
 *		    left of them; 0 for 64 MiB. Only with KUCOMMS_POOLS
 */
struct kucomms_endpoint_options {
	size_t size;
	u32 flags;
	u32 max_channels;
	u32 max_user_channels;
	u64 ring_size;
	u64 max_ring_size;
	u32 hello_length;
	const u8 *hello;
	u64 busy_poll_ns;
	u32 numbered;
	u64 max_pool_bytes;
};

struct kucomms_endpoint *
kucomms_register(const char *name, const struct kucomms_endpoint_ops *ops,
		 const struct kucomms_endpoint_options *options, void *priv);
int kucomms_unregister(struct kucomms_endpoint *endpoint);
int kucomms_announce(struct kucomms_endpoint *endpoint, u32 count);
int kucomms_wait_open(struct kucomms_endpoint *endpoint, s64 timeout_ns);
struct kucomms_channel *kucomms_wait_channel(struct kucomms_endpoint *endpoint,
					     u32 number, s64 timeout_ns);
void *kucomms_priv(struct kucomms_endpoint *endpoint);

int kucomms_send(struct kucomms_channel *channel,
		 const struct kucomms_message *message);
int kucomms_try_send(struct kucomms_channel *channel,
		     const struct kucomms_message *message);
int kucomms_send_unlocked(struct kucomms_channel *channel,
			  const struct kucomms_message *message);
int kucomms_pass_turn(struct kucomms_channel *channel);
bool kucomms_has_turn(struct kucomms_channel *channel);
int kucomms_reply(struct kucomms_channel *channel,
		  const struct kucomms_message *request,
		  const void *data, u32 length);
struct kucomms_message *kucomms_reserve(struct kucomms_channel *channel,
					u32 length);
int kucomms_commit(struct kucomms_channel *channel,
		   struct kucomms_message *message);
int kucomms_discard(struct kucomms_channel *channel,
		    struct kucomms_message *message);
struct kucomms_message *
kucomms_reserve_unlocked(struct kucomms_channel *channel, u32 length);
int kucomms_commit_unlocked(struct kucomms_channel *channel,
			    struct kucomms_message *message);

struct kucomms_message *kucomms_hold(struct kucomms_channel *channel,
				     const struct kucomms_message *message);
void kucomms_let_go(struct kucomms_channel *channel,
		    struct kucomms_message *message);
void kucomms_retry(struct kucomms_channel *channel);
void kucomms_resume(struct kucomms_channel *channel);
void kucomms_close(struct kucomms_channel *channel);

/*
 * Buffers. A message can hand over memory instead of carrying it: whole buffers
 * of a pool that both sides have mapped; only with KUCOMMS_POOLS. Each has one
 * holder at a time. All pools and buffers end with the channel: after the close
 * callback they are not to be used, but with kucomms_channel_get().
 */
struct kucomms_pool *kucomms_open_pool(struct kucomms_channel *channel,
				       u64 size, u32 flags);
void kucomms_close_pool(struct kucomms_pool *pool);
struct kucomms_buffer *kucomms_allocate(struct kucomms_pool *pool, u64 length);
struct kucomms_buffer *
kucomms_take_buffer(struct kucomms_channel *channel,
		    const struct kucomms_message *message, u32 i);
void kucomms_free_buffer(struct kucomms_buffer *buffer);
void *kucomms_buffer_data(const struct kucomms_buffer *buffer);
u64 kucomms_buffer_length(const struct kucomms_buffer *buffer);

u64 kucomms_tx_avail(struct kucomms_channel *channel);
u64 kucomms_tx_free(struct kucomms_channel *channel);
u64 kucomms_rx_avail(struct kucomms_channel *channel);
u64 kucomms_rx_free(struct kucomms_channel *channel);

struct kucomms_endpoint *
kucomms_channel_endpoint(struct kucomms_channel *channel);
int kucomms_channel_number(struct kucomms_channel *channel);
void *kucomms_channel_priv(struct kucomms_channel *channel);
void kucomms_channel_set_priv(struct kucomms_channel *channel, void *priv);
struct kucomms_channel *kucomms_channel_get(struct kucomms_channel *channel);
void kucomms_channel_put(struct kucomms_channel *channel);

#endif /* _KUCOMMS_H */
