package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// line is what is said of a connection, when it begins (debug) and when it ends.
// Fields and their order are the real ztunnel's (observability.md, section 6).
type line struct {
	pod                *Pod
	began              time.Time
	src, dst           netip.AddrPort
	outbound           bool
	hbone              string // what was asked for in a tunnel
	mtls               bool   // identities have been proven
	srcParty, dstParty party
	service            string
}

// party is one end of a connection, as far as it is known.
type party struct{ workload, namespace, identity, cluster string }

// partyOf describes a workload, which may be nil.
func partyOf(w *workload.Workload) party {
	if w == nil {
		return party{}
	}
	return party{w.Name, w.Namespace, w.Identity(), w.Cluster}
}

func (l *line) direction() string {
	if l.outbound {
		return "outbound"
	}
	return "inbound"
}

// fields are those that say who and where.
func (l *line) fields() []slog.Attr {
	src, dst := l.srcParty, l.dstParty
	if l.pod.mesh() == nil { // of the pod itself something is known even so
		own := party{workload: l.pod.Name, namespace: l.pod.Namespace}
		if l.outbound {
			src = own
		} else {
			dst = own
		}
	}
	if !l.mtls {
		src.identity, dst.identity = "", ""
	}
	a := make([]slog.Attr, 0, 18)
	known := func(key, value string) {
		if value != "" {
			a = append(a, slog.String(key, value))
		}
	}
	a = append(a, slog.Any("src.addr", l.src))
	known("src.workload", src.workload)
	known("src.namespace", src.namespace)
	known("src.identity", src.identity)
	known("src.cluster", src.cluster)
	a = append(a, slog.Any("dst.addr", l.dst))
	if l.hbone != "" {
		a = append(a, slog.Any("dst.hbone_addr", accesslog.Bare(l.hbone)))
	}
	known("dst.service", l.service)
	known("dst.workload", dst.workload)
	known("dst.namespace", dst.namespace)
	known("dst.identity", dst.identity)
	known("dst.cluster", dst.cluster)
	return append(a, slog.String("direction", l.direction()))
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
	switch {
	case err == errDrained || err == errEnding:
		return errDrained
	case err == errPolicyChange:
		return err
	}
	if l.outbound {
		return fmt.Errorf("io error: %s", osError(err))
	}
	return fmt.Errorf("connection failed: %s", osError(err))
}
