package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"time"
)

// line is what is said of a connection, when it begins (debug) and when it ends.
// Fields and their order are the real ztunnel's (observability.md, section 6).
type line struct {
	pod      *Pod
	began    time.Time
	src, dst netip.AddrPort
	outbound bool
}

func (l *line) direction() string {
	if l.outbound {
		return "outbound"
	}
	return "inbound"
}

// fields are those that say who and where.
func (l *line) fields() []slog.Attr {
	a := make([]slog.Attr, 0, 12)
	a = append(a, slog.Any("src.addr", l.src))
	if l.outbound {
		a = l.ours(a, "src")
	}
	a = append(a, slog.Any("dst.addr", l.dst))
	if !l.outbound {
		a = l.ours(a, "dst")
	}
	return append(a, slog.String("direction", l.direction()))
}

// ours appends what is known of the pod itself.
func (l *line) ours(a []slog.Attr, side string) []slog.Attr {
	if l.pod.Name == "" {
		return a
	}
	return append(a, slog.String(side+".workload", l.pod.Name), slog.String(side+".namespace", l.pod.Namespace))
}

// opened is said when a connection begins.
func (l *line) opened() {
	log := l.pod.config.Log
	if log.Enabled(context.Background(), slog.LevelDebug) {
		log.LogAttrs(context.Background(), slog.LevelDebug, "connection opened", l.fields()...)
	}
}

// complete is said when it ends: bytes that the pod has sent and received, and
// what went wrong.
func (l *line) complete(c Counts, err error) {
	sent, received := c.Sent, c.Received
	if !l.outbound { // the pod is at the other end
		sent, received = received, sent
	}
	a := append(l.fields(),
		slog.Int64("bytes_sent", sent),
		slog.Int64("bytes_recv", received),
		slog.String("duration", strconv.FormatInt(time.Since(l.began).Milliseconds(), 10)+"ms"))
	level := slog.LevelInfo
	if err != nil {
		level = slog.LevelError
		a = append(a, slog.String("error", err.Error()))
	}
	l.pod.config.Log.LogAttrs(context.Background(), level, "connection complete", a...)
}

// deny is said of a connection that has not become one.
func (l *line) deny(err error) {
	l.pod.config.Log.LogAttrs(context.Background(), slog.LevelWarn, "connection failed",
		slog.Any("src.addr", l.src), slog.Any("dst.addr", l.dst), slog.String("direction", l.direction()), slog.String("error", err.Error()))
}

// connectError words why there is no connection onward.
func (l *line) connectError(err error) error {
	if err == errDrained || err == errEnding {
		return errDrained
	}
	if l.outbound {
		return fmt.Errorf("io error: %s", osError(err))
	}
	return fmt.Errorf("connection failed: %s", osError(err))
}
