/* SPDX-License-Identifier: GPL-2.0-only */
/* Tracepoints: /sys/kernel/tracing/events/kucomms */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kucomms

#if !defined(_KUCOMMS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _KUCOMMS_TRACE_H

#include <linux/tracepoint.h>

DECLARE_EVENT_CLASS(kucomms_message,
	TP_PROTO(u64 channel, u64 type, u64 id, u32 length, int err),
	TP_ARGS(channel, type, id, length, err),
	TP_STRUCT__entry(
		__field(u64, channel)
		__field(u64, type)
		__field(u64, id)
		__field(u32, length)
		__field(int, err)
	),
	TP_fast_assign(
		__entry->channel = channel;
		__entry->type = type;
		__entry->id = id;
		__entry->length = length;
		__entry->err = err;
	),
	TP_printk("channel=%llu type=%llu id=%llu length=%u err=%d",
		  __entry->channel, __entry->type, __entry->id,
		  __entry->length, __entry->err)
);

DEFINE_EVENT(kucomms_message, kucomms_send,
	TP_PROTO(u64 channel, u64 type, u64 id, u32 length, int err),
	TP_ARGS(channel, type, id, length, err)
);

DEFINE_EVENT(kucomms_message, kucomms_receive,
	TP_PROTO(u64 channel, u64 type, u64 id, u32 length, int err),
	TP_ARGS(channel, type, id, length, err)
);

DECLARE_EVENT_CLASS(kucomms_channel,
	TP_PROTO(u64 channel),
	TP_ARGS(channel),
	TP_STRUCT__entry(__field(u64, channel)),
	TP_fast_assign(__entry->channel = channel;),
	TP_printk("channel=%llu", __entry->channel)
);

DEFINE_EVENT(kucomms_channel, kucomms_wake,
	TP_PROTO(u64 channel),
	TP_ARGS(channel)
);

DEFINE_EVENT(kucomms_channel, kucomms_protocol_error,
	TP_PROTO(u64 channel),
	TP_ARGS(channel)
);

#endif /* _KUCOMMS_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
