/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the module share.
 *
 *	main.c		init, sysfs: create_device, remove_device
 *	device.c	the open file: ioctls, mmap, poll
 *	channel.c	memory, rings, sending
 *	pool.c		pools, and buffers that messages hand over
 *	extents.c	which pages of a pool are free
 *	runner.c	the thread that calls an endpoint's callbacks
 *	endpoint.c	register, unregister
 *	debugfs.c	counters
 *
 * Locks, in the order in which they are taken:
 *
 *	kucomms_names_lock	creating and removing devices
 *	kucomms_file.lock	setting up a channel
 *	kucomms_announce_lock	declaring numbered channels
 *	kucomms_lock		the lists of devices and endpoints, and which
 *				endpoint a device has
 *	kucomms_channel.runner_lock	that its runner exists, and who has
 *				counted that its user is gone
 *	kucomms_runner.lock	its list of channels to look at
 *
 * and kucomms_channel.tx_lock, with a pool's lock below it, kucomms_pools.lock,
 * kucomms_endpoint.users_lock, that of kucomms_endpoint.numbers, and
 * kucomms_file.pending_lock, which are leaves.
 */
#ifndef _KUCOMMS_INTERNAL_H
#define _KUCOMMS_INTERNAL_H

#include <linux/atomic.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/hashtable.h>
#include <linux/irq_work.h>
#include <linux/kref.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/llist.h>
#include <linux/mm_types.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/refcount.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include <kucomms/kucomms.h>
#include <kucomms/ring.h>

#define KUCOMMS_PREFIX		"kucomms_"
#define KUCOMMS_PREFIX_LENGTH	(sizeof(KUCOMMS_PREFIX) - 1)
#define KUCOMMS_DEVICE_NAME_MAX	(KUCOMMS_PREFIX_LENGTH + KUCOMMS_NAME_MAX)
#define KUCOMMS_RING_DEFAULT	((u64)SZ_1M)
#define KUCOMMS_RING_LIMIT	((u64)SZ_16M)
#define KUCOMMS_RING_MAX	((u64)SZ_2G)
#define KUCOMMS_CHANNELS_DEFAULT	1024	/* of an endpoint, */
#define KUCOMMS_USER_CHANNELS_DEFAULT	256	/* of these, of one user */
#define KUCOMMS_POOL_BYTES_DEFAULT	((u64)SZ_64M)
#define KUCOMMS_LOAN_LIMIT	BITS_PER_LONG
#define KUCOMMS_HOLD_LIMIT	BITS_PER_LONG
#define KUCOMMS_BUSY_POLL_LIMIT	(100 * NSEC_PER_MSEC)
#define KUCOMMS_PUT_MAX		2048	/* bytes copied with interrupts off */
/* Pages that users pay for: their limit is to be an error, and kill nobody. */
#define KUCOMMS_GFP_PAGES	(GFP_KERNEL_ACCOUNT | __GFP_ZERO | \
				 __GFP_NOWARN | __GFP_RETRY_MAYFAIL)
/* A signal ends such a sleep, and a suspend freezes it where it is. */
#ifdef TASK_FREEZABLE
#define KUCOMMS_SLEEP		(TASK_INTERRUPTIBLE | TASK_FREEZABLE)
#else
#define KUCOMMS_SLEEP		TASK_INTERRUPTIBLE
#endif
#define KUCOMMS_BATCH		64	/* messages of a channel in a row, */
#define KUCOMMS_BATCH_BYTES	SZ_256K	/* and bytes, by about */

/**
 * struct kucomms_device - /dev/kucomms_NAME
 * @list: in kucomms_devices
 * @name: with the prefix
 * @minor: number of the device
 * @endpoint: who has registered under this name, or NULL
 * @opens: files that are open
 * @channels: that are attached
 * @ending: of those, whose user is gone
 * @news: how often something has changed for who did not get a channel
 * @wait: for an endpoint, and for @news
 */
struct kucomms_device {
	struct list_head list;
	char name[KUCOMMS_DEVICE_NAME_MAX + 1];
	u32 minor;
	struct kucomms_endpoint *endpoint;
	unsigned int opens;
	atomic_t channels;
	atomic_t ending;
	atomic64_t news;
	wait_queue_head_t wait;
};

/**
 * struct kucomms_user - a user who has channels of an endpoint
 * @node: in the endpoint's users
 * @uid: which user
 * @channels: how many
 * @ending: of those, whose user is gone
 */
struct kucomms_user {
	struct hlist_node node;
	kuid_t uid;
	u32 channels;
	atomic_t ending;
};

/**
 * struct kucomms_endpoint - who has registered
 * @list: in kucomms_endpoints
 * @name: of the device that it belongs to, which may not be there yet
 * @serial: tells it from those that had this name before
 * @device: when it is there
 * @ops: the callbacks
 * @options: with all defaults filled in
 * @hello: what options.hello points to
 * @priv: the module's
 * @shared: the runner of all channels; NULL with one for each
 * @runners: those of single channels
 * @channels: that are attached
 * @opened: of those, for which the open callback has returned
 * @users_lock: of @users, and of how many channels each has
 * @users: that have channels, by user id
 * @numbered: how many numbered channels there are
 * @numbers: by number, who has it
 * @wait: for a channel, and for the last runner to go
 */
struct kucomms_endpoint {
	struct list_head list;
	char name[KUCOMMS_DEVICE_NAME_MAX + 1];
	u64 serial;
	struct kucomms_device *device;
	const struct kucomms_endpoint_ops *ops;
	struct kucomms_endpoint_options options;
	u8 hello[KUCOMMS_HELLO_MAX];
	void *priv;
	struct kucomms_runner *shared;
	struct list_head runners;
	atomic_t channels;
	atomic_t opened;
	spinlock_t users_lock;	/* see above */
	DECLARE_HASHTABLE(users, 6);
	u32 numbered;
	struct xarray numbers;
	wait_queue_head_t wait;
};

/**
 * struct kucomms_runner - a thread that calls callbacks
 * @list: in the endpoint's runners
 * @endpoint: whose callbacks
 * @task: the thread
 * @started: it has begun
 * @lock: of @ready
 * @ready: channels to look at
 * @channels: all that are open; the thread's own
 * @next_work: when the next work tick is due
 * @next_timer: when the next timer tick is due
 * @buffer: for the copy of a message
 * @buffer_size: bytes of @buffer
 * @drained: channels that were found empty and are not parked; the thread's own
 * @drained_count: how many
 * @poll_budget: nanoseconds to spin before the next sleep
 * @poll_rest: sleeps before spinning is tried again
 * @shut: shut all channels down
 * @finished: its single channel is gone
 * @reap: ends the thread of a single channel
 */
struct kucomms_runner {
	struct list_head list;
	struct kucomms_endpoint *endpoint;
	struct task_struct *task;
	struct completion started;
	raw_spinlock_t lock;
	struct list_head ready;
	struct list_head channels;
	ktime_t next_work;
	ktime_t next_timer;
	void *buffer;
	size_t buffer_size;
	struct list_head drained;
	unsigned int drained_count;
	u64 poll_budget;
	unsigned int poll_rest;
	bool shut;
	bool finished;
	struct work_struct reap;
};

/**
 * struct kucomms_loan - a message that is written in place
 * @message: what the module has
 * @frame: its place in the ring
 * @position: of @frame, when it was begun without the lock
 * @length: that it was made for
 */
struct kucomms_loan {
	struct kucomms_message message;
	struct kucomms_frame *frame;
	u64 position;
	u32 length;
};

/**
 * struct kucomms_held - a message that the module holds beyond its callback
 * @message: what the module has
 * @pin: keeps its bytes in the ring
 */
struct kucomms_held {
	struct kucomms_message message;
	struct kucomms_pin pin;
};

/* Whose turn it is to send, as in channel.h of user space. */
enum {
	KUCOMMS_TURN_ANY,	/* a channel without turns */
	KUCOMMS_TURN_OURS,
	KUCOMMS_TURN_THEIRS,
};

/**
 * struct kucomms_pools - the pools of a channel, and their buffers that move
 * @lock: of @next, of @taken, and of filling and emptying @slots
 * @next: the number of a side's next pool, by two
 * @slots: those that are alive, of side 0 and of side 1
 * @limit: bytes that all pools of the user may have
 * @taken: bytes that they have, and those that are just being made
 * @sweep: some of them may have to go
 * @is_short: the module has found no room in a pool, and has not been told of any
 * @back: buffers that are to be given back to the user
 * @news: of pools
 * @first_back: the next of those that were in @back; the sender's, as are
 * @first_news: the same for @news, and
 * @sent: buffers that were handed over
 * @came_back: buffers of the module's pools, since the runner asked
 * @caller: the runner's thread, in a callback that is called again for those
 * @callback: the number of that callback
 * @freed: it has freed some that are older than it
 * @received: the runner's: buffers that came in messages
 * @hand_count: of @hand, whose message is in the callback, or left for later
 * @hand_at: where that message is in the ring
 * @ahead: notices before this position were taken already
 * @hand: the buffers of that message
 */
struct kucomms_pools {
	spinlock_t lock;	/* see above */
	u32 next[2];
	struct kucomms_pool *slots[2][KUCOMMS_POOLS_MAX];
	u64 limit;
	u64 taken;
	atomic_t sweep;
	atomic_t is_short;
	struct llist_head back;
	struct llist_head news;
	struct llist_node *first_back;
	struct llist_node *first_news;
	u64 sent;
	atomic_t came_back;
	struct task_struct *caller;
	u64 callback;
	bool freed;
	u64 received;
	u32 hand_count;
	u64 hand_at;
	u64 ahead;
	struct kucomms_buffer *hand[KUCOMMS_CARRIED_MAX];
};

/* Bits of kucomms_channel.state. */
enum {
	KUCOMMS_OPENED,		/* the open callback has said yes */
	KUCOMMS_USER_GONE,	/* the last mapping went, or it said so */
	KUCOMMS_CLOSE_WANTED,	/* kucomms_close() was called */
	KUCOMMS_BROKEN,		/* the user broke the rules */
	KUCOMMS_RETRY,		/* no message callbacks now */
	KUCOMMS_STAYS,		/* the message in the callback is not taken */
	KUCOMMS_RESUMED,	/* ... and may be handed out again at once */
	KUCOMMS_WORK_AGAIN,	/* the work callback has more to do */
	KUCOMMS_KICK,		/* the signal is for the runner, too */
	KUCOMMS_HUNG_UP,	/* for poll: the end, for good */
};

/**
 * struct kucomms_channel - an open file that was set up
 * @ref: one for the file, one while attached to a runner, the module's
 * @endpoint: its; valid while attached
 * @device: its; valid while attached
 * @priv: the module's
 * @serial: tells channels of an endpoint apart
 * @number: the one that users know, or -ENOENT
 * @pid: of the process that has opened the file
 * @uid: the effective user that it had then
 * @user: who is counted for it; before it is attached, room for that
 * @hello: its greeting
 * @hello_length: of @hello
 * @features: in force, KUCOMMS_FEATURE_...
 * @pools: with KUCOMMS_FEATURE_POOLS, else NULL
 * @ring_size: of each ring
 * @side_pages: pages of one side
 * @pages: those of side 0, then those of side 1
 * @at: where each side is mapped, its data twice in a row
 * @tx_lock: of all up to @loans
 * @tx: the ring to the user
 * @tx_open: whether anything can be sent
 * @turn: whose it is; written by senders, and by the runner without the lock
 * @short_of: the bytes of a send that has met a full ring; 0 for none
 * @loans_out: which of @loans are in use
 * @loans: messages that are written in place
 * @copying: long messages that are copied without the lock just now
 * @crowded: too many were copied at once for one more
 * @rx: the ring from the user; the runner's own
 * @turn_at: position of the message that has brought the turn; the runner's own
 * @in_hand: the message that the callback has now
 * @held: room for messages that are held; NULL without KUCOMMS_RX_IN_PLACE
 * @held_now: which of @held are in use; the runner's own
 * @let_go: which of those are not wanted any more
 * @state: KUCOMMS_OPENED ...
 * @polls_hit: times that the runner has spun for it and something came
 * @polls_missed: times that it did in vain
 * @poll_ns: how long that took
 * @runner_lock: of @runner
 * @runner: who serves it; NULL when it is over
 * @ready: in the runner's list
 * @attached: in the runner's list of all
 * @drained: in the runner's list of those to be parked
 * @answered: the open callback has returned @open_result
 * @open_result: 0 or -errno
 * @mappings: of the pages, in user space
 * @wait: for the answer, then for what poll() tells
 * @signal: wakes from contexts that must not
 * @release: frees from contexts that must not
 * @debugfs: its file there
 */
struct kucomms_channel {
	struct kref ref;
	struct kucomms_endpoint *endpoint;
	struct kucomms_device *device;
	void *priv;
	u64 serial;
	int number;
	pid_t pid;
	kuid_t uid;
	struct kucomms_user *user;
	u8 hello[KUCOMMS_HELLO_MAX];
	u32 hello_length;

	u64 features;
	struct kucomms_pools *pools;
	u64 ring_size;
	unsigned long side_pages;
	struct page **pages;
	void *at[2];

	raw_spinlock_t tx_lock;
	struct kucomms_ring_producer tx;
	bool tx_open;
	u32 turn;
	u64 short_of;
	u64 messages_sent;
	u64 bytes_sent;
	u64 full;
	unsigned long loans_out;
	struct kucomms_loan loans[KUCOMMS_LOAN_LIMIT];
	atomic_t copying;
	bool crowded;

	struct kucomms_ring_consumer rx;
	u64 turn_at;
	const struct kucomms_message *in_hand;
	struct kucomms_held *held;
	unsigned long held_now;
	atomic_long_t let_go;
	u64 messages_received;
	u64 bytes_received;
	u64 ticks_missed;
	u64 polls_hit;
	u64 polls_missed;
	u64 poll_ns;
	atomic64_t doorbells_rung;
	atomic64_t doorbells_heard;

	unsigned long state;
	raw_spinlock_t runner_lock;
	struct kucomms_runner *runner;
	struct list_head ready;
	struct list_head attached;
	struct list_head drained;
	bool answered;
	int open_result;

	atomic_t mappings;
	wait_queue_head_t wait;
	struct irq_work signal;
	struct work_struct release;
	struct dentry *debugfs;
};

/* What is alive, so that a test can see that all of it went. */
struct kucomms_alive {
	atomic_t devices;
	atomic_t endpoints;
	atomic_t runners;
	atomic_t channels;
	atomic_long_t pages;
	atomic64_t protocol_errors;
};

extern struct kucomms_alive kucomms_alive;
extern struct workqueue_struct *kucomms_workqueue;
extern struct mutex kucomms_lock;
extern struct list_head kucomms_endpoints;

/* main.c */
int kucomms_check_name(const char *name, size_t length);
struct kucomms_device *kucomms_find_device(const char *name);

/* device.c */
extern const struct file_operations kucomms_fops;
struct kucomms_device *kucomms_device_by_minor(u32 minor);

/* channel.c */
bool kucomms_has_room(unsigned long count);
struct page **kucomms_pages_list(unsigned long count);
int kucomms_pages_alloc(struct page **pages, unsigned long count);
void kucomms_pages_free(struct page **pages, unsigned long count);
int kucomms_pages_map(struct vm_area_struct *vma, struct page **pages,
		      vm_flags_t never);
struct kucomms_channel *kucomms_channel_new(u64 ring_size, u64 features);
int kucomms_channel_mmap(struct kucomms_channel *channel,
			 struct vm_area_struct *vma);
void kucomms_channel_signal(struct kucomms_channel *channel);
void kucomms_channel_alert(struct kucomms_channel *channel);
void kucomms_channel_broken(struct kucomms_channel *channel);
void kucomms_channel_lose_user(struct kucomms_channel *channel);
void kucomms_channel_user_gone(struct kucomms_channel *channel);
int kucomms_channel_user_error(const struct kucomms_channel *channel);
__poll_t kucomms_channel_events(struct kucomms_channel *channel);
bool kucomms_channel_pay(struct kucomms_channel *channel);
bool kucomms_channel_room(struct kucomms_channel *channel);
bool kucomms_channel_stop_sending(struct kucomms_channel *channel);
void kucomms_channel_take_turn(struct kucomms_channel *channel);
int kucomms_channel_check_turn(const struct kucomms_channel *channel,
			       const struct kucomms_view *view);

/* pool.c */
int kucomms_pools_new(struct kucomms_channel *channel);
void kucomms_pools_free(struct kucomms_channel *channel);
void kucomms_pools_sweep(struct kucomms_channel *channel);
void kucomms_pools_count(struct kucomms_channel *channel, unsigned int *count,
			 u64 *pages);
long kucomms_ioctl_open_pool(struct kucomms_channel *channel,
			     void __user *argument);
long kucomms_ioctl_close_pool(struct kucomms_channel *channel,
			      void __user *argument);
bool kucomms_is_of_pool(const struct vm_area_struct *vma);
int kucomms_pool_mmap(struct kucomms_channel *channel,
		      struct vm_area_struct *vma);
int kucomms_buffers_claim(struct kucomms_channel *channel,
			  const struct kucomms_message *message);
void kucomms_buffers_unclaim(const struct kucomms_message *message, u32 count);
int kucomms_hand_over(const struct kucomms_message *message,
		      struct kucomms_carried *list);
bool kucomms_owes(const struct kucomms_channel *channel);
int kucomms_pay(struct kucomms_channel *channel);
int kucomms_buffers_received(struct kucomms_channel *channel,
			     const struct kucomms_view *view);
int kucomms_buffers_returned(struct kucomms_channel *channel,
			     const struct kucomms_view *view);
void kucomms_buffers_stay(struct kucomms_channel *channel);
void kucomms_buffers_done(struct kucomms_channel *channel);
bool kucomms_buffers_came_back(struct kucomms_channel *channel);
void kucomms_callback_begins(struct kucomms_channel *channel);
bool kucomms_callback_ended(struct kucomms_channel *channel);

/* runner.c */
struct kucomms_runner *kucomms_runner_new(const char *name);
void kucomms_runner_start(struct kucomms_runner *runner,
			  struct kucomms_endpoint *endpoint);
void kucomms_runner_stop(struct kucomms_runner *runner);
void kucomms_runner_free(struct kucomms_runner *runner);
int kucomms_runner_grow(struct kucomms_runner *runner,
			struct kucomms_channel *channel, gfp_t gfp);
void kucomms_runner_attach(struct kucomms_runner *runner,
			   struct kucomms_channel *channel);
void kucomms_channel_kick(struct kucomms_channel *channel);
bool kucomms_runner_is_current(struct kucomms_endpoint *endpoint);

/* endpoint.c */
int kucomms_endpoint_admits(struct kucomms_endpoint *endpoint, s64 wanted,
			    kuid_t uid);
int kucomms_endpoint_attach(struct kucomms_endpoint *endpoint,
			    struct kucomms_channel *channel,
			    struct kucomms_runner *runner, s64 wanted);
void kucomms_endpoint_detach(struct kucomms_channel *channel, bool ending);

/* debugfs.c */
void kucomms_debugfs_init(void);
void kucomms_debugfs_exit(void);
void kucomms_debugfs_add(struct kucomms_channel *channel, const char *name);
void kucomms_debugfs_remove(struct kucomms_channel *channel);

#endif /* _KUCOMMS_INTERNAL_H */
