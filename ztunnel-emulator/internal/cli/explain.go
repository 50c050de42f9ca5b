package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/handoff"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// explain narrates a handoff for a learner, one line a step, after it is over:
// to print while a thread is in the pod would keep it there.
func explain(w io.Writer, path string, h inpod.Handoff) {
	var b strings.Builder
	step := func(took time.Duration, format string, args ...any) {
		fmt.Fprintf(&b, "ztunnel-emulator %s (%d µs)\n", fmt.Sprintf(format, args...), took.Microseconds())
	}

	step(h.Wait, "accept on %s: pid %d, uid %d (SO_PEERCRED), and its message", path, h.Peer.PID, h.Peer.UID)
	if h.PeerFD != fdpass.NoFD {
		step(h.Judge, "recvmsg: byte %#02x, and a descriptor in SCM_RIGHTS: fd %d here, whatever its number was there; fstat and NS_GET_NSTYPE say %v", handoff.Add, h.PeerFD, h.NetNS)
	}
	if v := h.Added.Visit; v.TID != 0 {
		step(v.Enter, "[thread %d] setns(%d, CLONE_NEWNET): %v -> %v", v.TID, h.PeerFD, v.Home, v.Inside)
		var bound []string
		for i, fd := range h.Added.FDs {
			bound = append(bound, fmt.Sprintf("%v = fd %d", h.Added.Addrs[i], fd))
		}
		if h.Err == nil {
			step(v.Work, "[thread %d] socket, bind, listen: %s", v.TID, strings.Join(bound, ", "))
		}
		step(v.Leave, "[thread %d] setns back: %v -> %v; the sockets stay in the pod", v.TID, v.Inside, v.Back)
	}
	switch {
	case h.Err != nil:
		step(h.Duration, "reply: byte %#02x and %q; in all", handoff.Refused, h.Err)
	case !h.Added.New:
		step(h.Duration, "reply: byte %#02x; the pod had its listeners already; in all", handoff.Ready)
	default:
		step(h.Added.Watch, "epoll watches the listeners, from outside the pod")
		step(h.Duration, "reply: byte %#02x, listeners ready; from the descriptor to here", handoff.Ready)
	}
	io.WriteString(w, b.String()) // one write, so that handoffs do not mix
}
