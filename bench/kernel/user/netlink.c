// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Netlink, simple, with resynchronisation, and generic. One system call for each message. */

#include <errno.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "user.h"

#define RECEIVE_BUFFER	(4 << 20)	/* a burst, as the kernel counts it */
#define SMALL_BUFFER	(64 << 10)	/* and one that makes it lose messages */

static int sock;
static uint16_t family;		/* of generic netlink */

/* A packet, and a message in it. */
static struct {
	struct nlmsghdr header;
	uint64_t words[KBENCH_WORDS];
} packet;

/* The same for generic netlink. */
static struct {
	struct nlmsghdr header;
	struct genlmsghdr command;
	struct nlattr attribute;
	uint64_t words[KBENCH_WORDS];
} generic;

static int open_socket(int protocol, int receive_buffer)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK };
	socklen_t size = sizeof(address);

	sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
	if (sock < 0 ||
	    bind(sock, (const struct sockaddr *)&address, sizeof(address)) ||
	    connect(sock, (const struct sockaddr *)&address, sizeof(address)) ||
	    getsockname(sock, (struct sockaddr *)&address, &size) ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer,
		       sizeof(receive_buffer)))
		return -errno;
	run.start.port = address.nl_pid;
	packet.header.nlmsg_len = sizeof(packet);
	packet.header.nlmsg_type = KBENCH_NL_DATA;
	packet.header.nlmsg_flags = NLM_F_REQUEST;
	kbench_fill((__u64 *)packet.words, 0, 1);
	return 0;
}

static int wait_first(uint64_t first)
{
	(void)first;
	return wait_readable(sock);
}

/* ---- simple ------------------------------------------------------------------ */

static int simple_open(void)
{
	return open_socket(KBENCH_NETLINK, RECEIVE_BUFFER);
}

static int simple_send(uint64_t first, uint32_t count)
{
	uint64_t number;

	for (number = first; number < first + count; number++) {
		fill(packet.words, number);
		if (send(sock, &packet, sizeof(packet), 0) != sizeof(packet))
			return -errno;
	}
	return 0;
}

static int simple_receive(uint64_t first, uint32_t count)
{
	uint64_t number;
	ssize_t got;

	for (number = first; number < first + count; number++) {
		got = recv(sock, &packet, sizeof(packet), MSG_DONTWAIT);
		if (got < 0)
			return -errno;
		if (got != sizeof(packet) || !good(packet.words, number))
			return -EBADMSG;
	}
	return 0;
}

const struct mechanism netlink = {
	.name = "netlink",
	.number = KBENCH_M_NETLINK,
	.open = simple_open,
	.send = simple_send,
	.wait = wait_first,
	.receive = simple_receive,
};

/* ---- with resynchronisation ---------------------------------------------------- */

/* What was sent and not acknowledged, by number, each as it goes out. */
static struct {
	struct nlmsghdr header;
	uint64_t words[KBENCH_WORDS];
} window[KBENCH_WINDOW];

static uint64_t acked;		/* the kernel has all before this */
static uint64_t expected;	/* the next from the kernel */

static int resync_open(void)
{
	int err, i;

	/* When every byte is checked, so is that what is lost is sent again. */
	err = open_socket(KBENCH_NETLINK_RESYNC,
			  run.start.full ? SMALL_BUFFER : RECEIVE_BUFFER);
	for (i = 0; i < KBENCH_WINDOW; i++)
		memcpy(&window[i], &packet, sizeof(packet));
	return err;
}

static int send_from(uint64_t number, uint64_t end)
{
	for (; number < end; number++)
		if (send(sock, &window[number % KBENCH_WINDOW], sizeof(window[0]), 0) < 0)
			return -errno;
	return 0;
}

/*
 * Take the kernel's answers to the messages before @sent off the socket, and
 * send again what it asks for. Return: 1 when there was an answer, 0, -errno.
 */
static int hear(uint64_t sent)
{
	struct {
		struct nlmsghdr header;
		uint64_t number;
	} answer;

	if (recv(sock, &answer, sizeof(answer), MSG_DONTWAIT) < 0)
		return errno == EAGAIN ? 0 : -errno;
	acked = answer.number;
	if (answer.header.nlmsg_type != KBENCH_NL_NAK)
		return 1;
	recovered++;
	return send_from(answer.number, sent) ?: 1;
}

static int resync_send(uint64_t first, uint32_t count)
{
	const uint64_t end = first + count;
	uint64_t number;
	int err;

	for (number = first; number < end; number++) {
		fill(window[number % KBENCH_WINDOW].words, number);
		err = send_from(number, number + 1);
		if (err)
			return err;
		if ((number + 1) % KBENCH_ACK_EVERY)
			continue;
		do {
			err = hear(number + 1);
		} while (err > 0);
		if (err)
			return err;
	}
	/* All have come when the last is acknowledged. */
	while (acked < end) {
		err = hear(end);
		if (!err)	/* the last were lost, there is nothing to show it */
			err = send_from(acked, end);
		if (err < 0)
			return err;
	}
	return 0;
}

/* Tell the kernel what we have. */
static int answer(uint16_t type)
{
	struct {
		struct nlmsghdr header;
		uint64_t number;
	} message = {
		.header.nlmsg_len = sizeof(message),
		.header.nlmsg_type = type,
		.header.nlmsg_flags = NLM_F_REQUEST,
		.number = expected,
	};

	recovered += type == KBENCH_NL_NAK;
	return send(sock, &message, sizeof(message), 0) < 0 ? -errno : 0;
}

/* The next message. Return: 1 it is the one, 0 there was a loss, -EAGAIN, -errno. */
static int resync_next(void)
{
	ssize_t got = recv(sock, &packet, sizeof(packet), MSG_DONTWAIT);

	if (got < 0)
		return errno == ENOBUFS ? 0 : -errno;
	if (got != sizeof(packet))
		return -EBADMSG;
	if (packet.words[0] != expected)
		return 0;
	return good(packet.words, expected) ? 1 : -EBADMSG;
}

static int resync_receive(uint64_t first, uint32_t count)
{
	const uint64_t end = first + count;
	int err;

	expected = first;
	while (expected < end) {
		err = resync_next();
		if (err == -EAGAIN)	/* what was lost, and what came after it */
			err = answer(KBENCH_NL_NAK);
		else if (err == 1 && ++expected % KBENCH_ACK_EVERY == 0)
			err = answer(KBENCH_NL_ACK);
		if (err < 0)
			return err;
	}
	return answer(KBENCH_NL_ACK);
}

const struct mechanism netlink_resync = {
	.name = "netlink-resync",
	.number = KBENCH_M_NETLINK_RESYNC,
	.open = resync_open,
	.send = resync_send,
	.wait = wait_first,
	.receive = resync_receive,
};

/* ---- generic --------------------------------------------------------------------- */

/* The family's number: an attribute of the answer of the controller. */
static int find_family(void)
{
	struct {
		struct nlmsghdr header;
		struct genlmsghdr command;
		struct nlattr attribute;
		char name[8];
	} request = {
		.header.nlmsg_len = sizeof(request),
		.header.nlmsg_type = GENL_ID_CTRL,
		.header.nlmsg_flags = NLM_F_REQUEST,
		.command.cmd = CTRL_CMD_GETFAMILY,
		.command.version = 1,
		.attribute.nla_len = NLA_HDRLEN + sizeof(KBENCH_FAMILY),
		.attribute.nla_type = CTRL_ATTR_FAMILY_NAME,
		.name = KBENCH_FAMILY,
	};
	unsigned char reply[4096];
	struct nlmsghdr header;
	struct nlattr attribute;
	ssize_t got, at;

	if (send(sock, &request, sizeof(request), 0) < 0)
		return -errno;
	got = recv(sock, reply, sizeof(reply), 0);
	if (got < 0)
		return -errno;
	memcpy(&header, reply, sizeof(header));
	if (header.nlmsg_type == NLMSG_ERROR)
		return -ENOENT;
	for (at = NLMSG_HDRLEN + GENL_HDRLEN; at + NLA_HDRLEN <= got;
	     at += NLA_ALIGN(attribute.nla_len)) {
		memcpy(&attribute, reply + at, sizeof(attribute));
		if (attribute.nla_len < NLA_HDRLEN)
			break;
		if (attribute.nla_type == CTRL_ATTR_FAMILY_ID) {
			memcpy(&family, reply + at + NLA_HDRLEN, sizeof(family));
			return 0;
		}
	}
	return -ENOENT;
}

static int generic_open(void)
{
	int err = open_socket(NETLINK_GENERIC, RECEIVE_BUFFER);

	if (!err)
		err = find_family();
	generic.header.nlmsg_len = sizeof(generic);
	generic.header.nlmsg_type = family;
	generic.header.nlmsg_flags = NLM_F_REQUEST;
	generic.command.cmd = KBENCH_GENL_DATA;
	generic.command.version = 1;
	generic.attribute.nla_len = NLA_HDRLEN + KBENCH_SIZE;
	generic.attribute.nla_type = KBENCH_GENL_BYTES;
	kbench_fill((__u64 *)generic.words, 0, 1);
	return err;
}

static int generic_send(uint64_t first, uint32_t count)
{
	uint64_t number;

	for (number = first; number < first + count; number++) {
		fill(generic.words, number);
		if (send(sock, &generic, sizeof(generic), 0) != sizeof(generic))
			return -errno;
	}
	return 0;
}

static int generic_receive(uint64_t first, uint32_t count)
{
	uint64_t number;
	ssize_t got;

	for (number = first; number < first + count; number++) {
		got = recv(sock, &generic, sizeof(generic), MSG_DONTWAIT);
		if (got < 0)
			return -errno;
		if (got != sizeof(generic) || !good(generic.words, number))
			return -EBADMSG;
	}
	return 0;
}

const struct mechanism genetlink = {
	.name = "genetlink",
	.number = KBENCH_M_GENETLINK,
	.open = generic_open,
	.send = generic_send,
	.wait = wait_first,
	.receive = generic_receive,
};
