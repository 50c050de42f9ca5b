// Package dns is what happens to a query that has come to port 15053: it goes to
// the node's resolvers as it was asked, byte for byte, from a socket inside the
// pod, and the answer comes back the same way. No name is known here.
//
//	resolv.conf(5) -> Resolvers -> Forwarder.Answer   one message
//	                               Forwarder.ServeTCP one connection of them
//
// A query over UDP is asked over UDP and one over TCP over TCP: a truncated
// answer is the client's to ask again.
package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	miekg "github.com/miekg/dns"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
)

// Port is where ztunnel's DNS proxy listens in a pod, UDP and TCP.
const Port = 15053

// Target is the log target of the lines about queries.
const Target = "dns"

// queryTimeout is how long a query may take in all, and how long a TCP client
// may take to send one: ztunnel's request and connect timeout.
const queryTimeout = 5 * time.Second

// DefaultLimit is how many queries of one pod may be under way: each holds up to
// three sockets for up to queryTimeout.
const DefaultLimit = 256

// Forwarder answers the queries of one pod. It must not be copied after its first
// use; its methods may be called at once from several goroutines, and leave none
// behind.
type Forwarder struct {
	Resolvers Resolvers

	// Dial connects a socket in the pod to a resolver, with ztunnel's mark or the
	// pod's rules would send the query back here. network is udp or tcp. It must
	// return soon after ctx is done.
	Dial func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error)

	Limit int          // of queries under way; 0 is DefaultLimit
	Log   *slog.Logger // nil logs nothing

	underWay atomic.Int64
	crowded  sync.Once
}

// Answer returns the answer to one message that a client has sent over network
// (udp or tcp), or nil if it deserves none. It takes five seconds at most; what
// the resolvers don't answer until then, or until ctx is done, is SERVFAIL.
func (f *Forwarder) Answer(ctx context.Context, msg []byte, network string) []byte {
	if len(msg) < headerSize || network == "udp" && complains(msg) {
		return nil
	}
	start := time.Now()
	var o outcome
	q, rcode := parseQuery(msg)
	switch {
	case rcode != miekg.RcodeSuccess:
		o.answer = q.reply(rcode)
	case !f.enter():
		o.answer = q.reply(miekg.RcodeServerFailure)
	default:
		o = f.forward(ctx, q, network)
		f.underWay.Add(-1)
		if o.answer == nil {
			o.answer = q.reply(miekg.RcodeServerFailure)
		}
		if network == "udp" && len(o.answer) > q.size {
			o.answer = q.truncate(o.answer)
		}
	}
	f.logQuery(ctx, q, network, o, time.Since(start))
	return o.answer
}

// enter takes a place among the queries under way. Past the limit there is none:
// a pod that asks faster than the resolvers answer must not eat the descriptors
// of all the others.
func (f *Forwarder) enter() bool {
	limit := f.Limit
	if limit == 0 {
		limit = DefaultLimit
	}
	if f.underWay.Add(1) <= int64(limit) {
		return true
	}
	f.underWay.Add(-1)
	f.crowded.Do(func() {
		f.log().Warn("too many DNS queries at once, SERVFAIL for what is above the limit (said once)",
			accesslog.Target, Target, "limit", limit)
	})
	return false
}

func (f *Forwarder) log() *slog.Logger {
	if f.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return f.Log
}

func (f *Forwarder) logQuery(ctx context.Context, q query, network string, o outcome, took time.Duration) {
	log := f.log()
	if !log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	attrs := []slog.Attr{
		slog.String(accesslog.Target, Target),
		slog.String("protocol", network),
		slog.String("query", miekg.Type(q.question.Qtype).String()),
		slog.String("domain", q.question.Name),
		slog.String("result", rcodeName(o.answer)),
	}
	if o.server.IsValid() {
		attrs = append(attrs, slog.Any("server", o.server))
	}
	if o.err != nil {
		attrs = append(attrs, slog.Any("error", o.err))
	}
	log.LogAttrs(ctx, slog.LevelDebug, "dns query", append(attrs, slog.Duration("duration", took))...)
}
