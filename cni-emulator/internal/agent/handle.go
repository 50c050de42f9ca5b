package agent

import (
	"log/slog"
	"sync/atomic"

	"ambient-emulator/internal/netns"
)

// handle is an open namespace with several users: the pod it belongs to, and
// every message on its way that carries it. The last to let go closes it, so
// that a descriptor number is never sent after it has come to mean something
// else. (The real agent leaves this to a finalizer of the garbage collector.)
type handle struct {
	ns     *netns.NS
	refs   atomic.Int32
	cookie uint64 // see Agent.cookie
	log    *slog.Logger
}

// newHandle takes ns over. The caller holds the first reference.
func newHandle(ns *netns.NS, log *slog.Logger) *handle {
	h := &handle{ns: ns, log: log}
	h.refs.Store(1)
	return h
}

// hold adds a reference. The caller knows that somebody else has one.
func (h *handle) hold() *handle {
	h.refs.Add(1)
	return h
}

// release drops a reference. A handle may be nil.
func (h *handle) release() {
	if h == nil || h.refs.Add(-1) > 0 {
		return
	}
	id := h.ns.ID()
	if err := h.ns.Close(); err != nil {
		h.log.Error("close a pod's namespace; the kernel may not be able to free it", "netns", id, "error", err)
	}
}
