// SPDX-License-Identifier: GPL-2.0-only
/* The control device, and the thread that is the kernel's side of most mechanisms. */

#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/uaccess.h>

#include "internal.h"

#define PATIENCE	(10 * HZ)

struct kbench_run kbench_run;
u64 kbench_buffer[KBENCH_WORDS];

static const struct kbench_mechanism *const mechanisms[KBENCH_MECHANISMS] = {
	[KBENCH_M_NETLINK] = &kbench_netlink,
	[KBENCH_M_NETLINK_RESYNC] = &kbench_netlink_resync,
	[KBENCH_M_GENETLINK] = &kbench_genetlink,
	[KBENCH_M_CHARDEV] = &kbench_chardev,
	[KBENCH_M_MMAP] = &kbench_mmap,
	[KBENCH_M_RELAY] = &kbench_relay,
	[KBENCH_M_PIPE] = &kbench_pipe,
	[KBENCH_M_BPF] = &kbench_bpf,
	[KBENCH_M_KUCOMMS] = &kbench_kucomms,
	[KBENCH_M_KUCOMMS_IN_PLACE] = &kbench_kucomms_in_place,
	[KBENCH_M_KUCOMMS_COPIED] = &kbench_kucomms_copied,
};

static atomic_t users = ATOMIC_INIT(0);	/* one program at a time */
static DECLARE_WAIT_QUEUE_HEAD(wake_thread);
static struct task_struct *thread;
static struct task_struct *user;
static bool armed;
static bool entered;
static bool pending;		/* an armed burst was not finished */
static bool theirs;		/* it is another thread's than ours */

/* The kernel's processor: the user program has the first one. */
int kbench_cpu(void)
{
	return cpumask_last(cpu_online_mask);
}

/* Wait until somebody has gone to sleep, so that waking it is what it always is. */
static int wait_until_asleep(struct task_struct *task)
{
	const unsigned long end = jiffies + PATIENCE;

	while (READ_ONCE(task->__state) == TASK_RUNNING || READ_ONCE(task->on_cpu)) {
		if (time_after(jiffies, end) || kbench_run.over)
			return -ETIMEDOUT;
		usleep_range(20, 50);
	}
	return 0;
}

static int send_burst(void)
{
	const struct kbench_mechanism *mechanism = kbench_run.mechanism;
	u64 begin;
	int err;

	err = mechanism->spins ? 0 : wait_until_asleep(user);
	if (err)
		return err;
	begin = kbench_cycles();
	err = mechanism->send(kbench_run.first, kbench_run.count);
	kbench_run.cycles = kbench_cycles() - begin;
	kbench_run.timed = kbench_run.count;
	return err;
}

/* See kbench_mechanism.asked. */
void kbench_send_asked(void)
{
	kbench_run.error = READ_ONCE(kbench_run.over) ? -ENOTCONN : send_burst();
	complete(&kbench_run.done);
}

static int receive_burst(void)
{
	const struct kbench_mechanism *mechanism = kbench_run.mechanism;
	u32 first = mechanism->first ? 1 : 0;
	u64 begin;
	int err = 0;

	if (mechanism->first)
		err = mechanism->first(kbench_run.first);
	else
		wait_for_completion(&kbench_run.kicked);
	wait_for_completion(&kbench_run.released);
	if (err || kbench_run.over)
		return err;
	begin = kbench_cycles();
	err = mechanism->receive(kbench_run.first + first, kbench_run.count - first);
	kbench_run.cycles = kbench_cycles() - begin;
	kbench_run.timed = kbench_run.count - first;
	return err;
}

static int thread_main(void *data)
{
	allow_signal(SIGUSR1);	/* stop_run() ends a wait with it */
	while (!kthread_should_stop()) {
		wait_event_interruptible(wake_thread, READ_ONCE(armed) || kthread_should_stop());
		flush_signals(current);
		if (!READ_ONCE(armed))
			continue;
		WRITE_ONCE(armed, false);
		smp_store_release(&entered, true);	/* pairs with wait_until_waiting() */
		kbench_run.error = kbench_run.start.direction == KBENCH_TO_USER ?
				   send_burst() : receive_burst();
		complete(&kbench_run.done);
	}
	return 0;
}

static int wait_until_waiting(void)
{
	const unsigned long end = jiffies + PATIENCE;

	while (!smp_load_acquire(&entered)) {		/* pairs with thread_main() */
		if (time_after(jiffies, end))
			return -ETIMEDOUT;
		usleep_range(20, 50);
	}
	return kbench_run.mechanism->spins ? 0 : wait_until_asleep(thread);
}

/* ---- the control device --------------------------------------------------- */

static void stop_run(void)
{
	const struct kbench_mechanism *mechanism = kbench_run.mechanism;

	if (!mechanism)
		return;
	WRITE_ONCE(kbench_run.over, true);
	complete_all(&kbench_run.kicked);
	complete_all(&kbench_run.released);
	if (pending && !theirs) {
		send_sig(SIGUSR1, thread, 1);
		wait_for_completion(&kbench_run.done);
	}
	pending = false;
	if (mechanism->stop)
		mechanism->stop();
	kbench_run.mechanism = NULL;
}

static int start_run(const struct kbench_start *start)
{
	const struct kbench_mechanism *mechanism;
	int err = 0;

	if (start->mechanism >= KBENCH_MECHANISMS || start->direction > KBENCH_TO_USER)
		return -EINVAL;
	mechanism = mechanisms[start->mechanism];
	stop_run();
	kbench_run.start = *start;
	kbench_run.over = false;
	kbench_run.error = 0;
	kbench_fill(kbench_buffer, 0, true);
	if (mechanism->start)
		err = mechanism->start(start);
	if (!err)
		kbench_run.mechanism = mechanism;
	return err;
}

static int arm(const struct kbench_burst *burst)
{
	const struct kbench_mechanism *mechanism = kbench_run.mechanism;
	bool to_user = kbench_run.start.direction == KBENCH_TO_USER;
	struct task_struct *sleeper;

	if (!mechanism || pending || burst->count < 2 || burst->count > KBENCH_SLOTS)
		return -EINVAL;
	if (to_user && !mechanism->send)
		return -EOPNOTSUPP;
	reinit_completion(&kbench_run.kicked);
	reinit_completion(&kbench_run.released);
	reinit_completion(&kbench_run.done);
	kbench_run.first = burst->first;
	kbench_run.count = burst->count;
	kbench_run.cycles = 0;
	kbench_run.timed = 0;
	kbench_run.error = 0;
	/* pairs with smp_load_acquire() of who is called for each message */
	smp_store_release(&kbench_run.seen, 0);
	if (!to_user && mechanism->inside)
		return 0;
	if (!to_user && mechanism->sleeper) {
		sleeper = mechanism->sleeper();
		pending = true;
		theirs = true;
		return sleeper ? wait_until_asleep(sleeper) : -ENOTCONN;
	}
	if (!to_user && !mechanism->receive)
		return -EOPNOTSUPP;
	if (user)
		put_task_struct(user);
	user = get_task_struct(current);
	entered = false;
	pending = true;
	theirs = to_user && mechanism->asked;
	if (theirs)
		return 0;
	smp_wmb();	/* all of it is there when the thread sees this */
	WRITE_ONCE(armed, true);
	wake_up(&wake_thread);
	return to_user ? 0 : wait_until_waiting();
}

static int finish(struct kbench_burst *burst)
{
	if (!kbench_run.mechanism)
		return -EINVAL;
	if (pending) {
		complete(&kbench_run.released);
		if (wait_for_completion_killable(&kbench_run.done))
			return -EINTR;
		pending = false;
	}
	memset(burst, 0, sizeof(*burst));
	burst->first = kbench_run.first;
	burst->count = kbench_run.count;
	burst->cycles = kbench_run.cycles;
	burst->timed = kbench_run.timed;
	burst->inside = kbench_run.mechanism->inside &&
			kbench_run.start.direction == KBENCH_TO_KERNEL;
	return kbench_run.error;
}

static long control_ioctl(struct file *file, unsigned int command, unsigned long value)
{
	void __user *argument = (void __user *)value;
	struct kbench_start start;
	struct kbench_burst burst;
	int err;

	switch (command) {
	case KBENCH_IOC_START:
		return copy_from_user(&start, argument, sizeof(start)) ? -EFAULT :
		       start_run(&start);
	case KBENCH_IOC_ARM:
		return copy_from_user(&burst, argument, sizeof(burst)) ? -EFAULT : arm(&burst);
	case KBENCH_IOC_KICK:
		complete(&kbench_run.kicked);
		return 0;
	case KBENCH_IOC_FINISH:
		err = finish(&burst);
		if (!err && copy_to_user(argument, &burst, sizeof(burst)))
			err = -EFAULT;
		return err;
	default:
		return -ENOTTY;
	}
}

static int control_open(struct inode *inode, struct file *file)
{
	if (atomic_cmpxchg(&users, 0, 1))
		return -EBUSY;
	return nonseekable_open(inode, file);
}

static int control_release(struct inode *inode, struct file *file)
{
	stop_run();
	atomic_set(&users, 0);
	return 0;
}

static const struct file_operations control_fops = {
	.owner		= THIS_MODULE,
	.open		= control_open,
	.release	= control_release,
	.unlocked_ioctl	= control_ioctl,
};

static struct miscdevice control = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= KBENCH_CONTROL,
	.fops	= &control_fops,
	.mode	= 0600,
};

/* ---- the module ------------------------------------------------------------ */

static void exit_mechanisms(int count)
{
	while (count-- > 0)
		if (mechanisms[count]->exit)
			mechanisms[count]->exit();
}

static int __init kbench_init(void)
{
	int i, err = 0;

	init_completion(&kbench_run.kicked);
	init_completion(&kbench_run.released);
	init_completion(&kbench_run.done);
	for (i = 0; i < KBENCH_MECHANISMS; i++) {
		if (mechanisms[i]->init)
			err = mechanisms[i]->init();
		if (err) {
			pr_err("kbench: mechanism %d: error %d\n", i, err);
			goto err_mechanisms;
		}
	}
	thread = kthread_create(thread_main, NULL, "kbench");
	if (IS_ERR(thread)) {
		err = PTR_ERR(thread);
		goto err_mechanisms;
	}
	kthread_bind(thread, kbench_cpu());
	wake_up_process(thread);
	err = misc_register(&control);
	if (!err)
		return 0;
	kthread_stop(thread);
err_mechanisms:
	exit_mechanisms(i);
	return err;
}

static void __exit kbench_exit(void)
{
	misc_deregister(&control);
	kthread_stop(thread);
	exit_mechanisms(KBENCH_MECHANISMS);
	if (user)
		put_task_struct(user);
}

module_init(kbench_init);
module_exit(kbench_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms bench: the kernel's side of each mechanism");
MODULE_VERSION("0.1.0");
