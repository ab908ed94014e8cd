// SPDX-License-Identifier: GPL-2.0-only
/*
 * Netlink, one socket buffer for each message. With resynchronisation, both
 * senders keep what was not acknowledged, and send it again from where the
 * receiver has missed something.
 */

#include <linux/module.h>
#include <linux/netlink.h>
#include <linux/vmalloc.h>
#include <net/net_namespace.h>
#include <net/netlink.h>

#include "internal.h"

static struct sock *simple_sock;
static struct sock *resync_sock;

/* One that may have to be sent again. */
struct message {
	u64 words[KBENCH_WORDS];
};

static struct message *window;	/* KBENCH_WINDOW of them, by number */
static u64 sent;		/* numbers before this were sent */
static u64 acked;		/* and before this acknowledged */
static u64 expected;		/* the next from the user */
static u64 asked;		/* for which we have sent the last NAK, + 1 */
static u64 arrived;		/* for losing some */

/* ---- to the kernel --------------------------------------------------------- */

static void simple_input(struct sk_buff *skb)
{
	u64 begin = kbench_cycles();
	const struct nlmsghdr *header = nlmsg_hdr(skb);
	int err = 0;

	if (skb->len < NLMSG_HDRLEN + KBENCH_SIZE ||
	    !kbench_check(nlmsg_data(header), kbench_run.first + kbench_run.timed))
		err = -EBADMSG;
	kbench_handled(kbench_cycles() - begin, err);
}

static int tell(u16 type, u64 number, u32 port)
{
	struct sk_buff *skb = nlmsg_new(sizeof(number), GFP_KERNEL);
	struct nlmsghdr *header;

	if (!skb)
		return -ENOMEM;
	header = nlmsg_put(skb, 0, (u32)number, type, sizeof(number), 0);
	memcpy(nlmsg_data(header), &number, sizeof(number));
	return nlmsg_unicast(resync_sock, skb, port);
}

/* A message, in order or not. */
static int resync_data(const struct nlmsghdr *header, u32 port)
{
	const u64 *words = nlmsg_data(header);
	u64 number = words[0];

	if (kbench_run.start.lose && ++arrived % kbench_run.start.lose == 0)
		return 0;	/* as if it had never come */
	if (number > expected && asked != expected + 1) {
		asked = expected + 1;
		return tell(KBENCH_NL_NAK, expected, port);
	}
	if (number != expected)
		return 0;	/* comes again; or had come already */
	if (!kbench_check(words, number))
		return -EBADMSG;
	kbench_run.timed++;
	expected++;
	return expected % KBENCH_ACK_EVERY ? 0 : tell(KBENCH_NL_ACK, expected, port);
}

/* ---- to the user ------------------------------------------------------------ */

static int send_words(struct sock *sock, const u64 *words)
{
	struct sk_buff *skb = nlmsg_new(KBENCH_SIZE, GFP_KERNEL);
	struct nlmsghdr *header;

	if (!skb)
		return -ENOMEM;
	header = nlmsg_put(skb, 0, (u32)words[0], KBENCH_NL_DATA, KBENCH_SIZE, 0);
	memcpy(nlmsg_data(header), words, KBENCH_SIZE);
	return nlmsg_unicast(sock, skb, kbench_run.start.port);
}

static int simple_send(u64 first, u32 count)
{
	u64 number;
	int err;

	for (number = first; number < first + count; number++) {
		kbench_fill(kbench_buffer, number, kbench_run.start.full);
		err = send_words(simple_sock, kbench_buffer);
		if (err)
			return err;
	}
	return 0;
}

static int resync_send(u64 first, u32 count)
{
	u64 number;
	int err;

	for (number = first; number < first + count; number++) {
		u64 *words = window[number % KBENCH_WINDOW].words;

		if (number - READ_ONCE(acked) >= KBENCH_WINDOW)
			return -ENOBUFS;
		kbench_fill(words, number, kbench_run.start.full);
		err = send_words(resync_sock, words);
		if (err && err != -EAGAIN)	/* that is lost; the user finds out */
			return err;
		WRITE_ONCE(sent, number + 1);
	}
	return 0;
}

/* Send again, as many as go into the user's buffer. */
static int resend(u64 number)
{
	int err;

	for (; number < READ_ONCE(sent); number++) {
		err = send_words(resync_sock, window[number % KBENCH_WINDOW].words);
		if (err)
			return err == -EAGAIN ? 0 : err;
	}
	return 0;
}

/* ---- both ------------------------------------------------------------------- */

static void resync_input(struct sk_buff *skb)
{
	u64 begin = kbench_cycles();
	const struct nlmsghdr *header = nlmsg_hdr(skb);
	const u64 *words = nlmsg_data(header);
	u32 port = NETLINK_CB(skb).portid;
	int err = -EBADMSG;

	if (skb->len < NLMSG_HDRLEN + sizeof(u64)) {
		kbench_run.error = err;
		return;
	}
	switch (header->nlmsg_type) {
	case KBENCH_NL_DATA:
		if (skb->len >= NLMSG_HDRLEN + KBENCH_SIZE)
			err = resync_data(header, port);
		kbench_run.cycles += kbench_cycles() - begin;
		break;
	case KBENCH_NL_ACK:
		err = 0;
		WRITE_ONCE(acked, words[0]);
		break;
	case KBENCH_NL_NAK:
		if (words[0] - acked <= KBENCH_WINDOW)
			err = resend(words[0]);
		break;
	}
	if (err)
		kbench_run.error = err;
}

static int resync_start(const struct kbench_start *start)
{
	struct message *message;
	int i;

	sent = 0;
	acked = 0;
	expected = 0;
	asked = 0;
	arrived = 0;
	for (i = 0; i < KBENCH_WINDOW; i++) {
		message = &window[i];
		kbench_fill(message->words, i, true);
	}
	return 0;
}

static int simple_init(void)
{
	struct netlink_kernel_cfg configuration = { .input = simple_input };

	simple_sock = netlink_kernel_create(&init_net, KBENCH_NETLINK, &configuration);
	return simple_sock ? 0 : -ENOMEM;
}

static void simple_exit(void)
{
	netlink_kernel_release(simple_sock);
}

static int resync_init(void)
{
	struct netlink_kernel_cfg configuration = { .input = resync_input };

	window = vzalloc(array_size(KBENCH_WINDOW, sizeof(*window)));
	if (!window)
		return -ENOMEM;
	resync_sock = netlink_kernel_create(&init_net, KBENCH_NETLINK_RESYNC, &configuration);
	if (resync_sock)
		return 0;
	vfree(window);
	return -ENOMEM;
}

static void resync_exit(void)
{
	netlink_kernel_release(resync_sock);
	vfree(window);
}

const struct kbench_mechanism kbench_netlink = {
	.init = simple_init,
	.exit = simple_exit,
	.send = simple_send,
	.inside = true,
};

const struct kbench_mechanism kbench_netlink_resync = {
	.init = resync_init,
	.exit = resync_exit,
	.start = resync_start,
	.send = resync_send,
	.inside = true,
};
