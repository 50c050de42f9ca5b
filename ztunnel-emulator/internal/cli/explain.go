package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// explain narrates a handoff for a learner, one line a step, after it is over:
// to print while a thread is in the pod would keep it there.
func explain(w io.Writer, path string, h inpod.Handoff) {
	var b strings.Builder
	step := func(took time.Duration, format string, args ...any) {
		fmt.Fprintf(&b, "ztunnel-emulator %s (%d µs)\n", fmt.Sprintf(format, args...), took.Microseconds())
	}
	outside := fmt.Sprintf("[thread %d]", h.TID)

	step(h.Wait, "%s accept on %s, and wait for the message: pid %d, uid %d (SO_PEERCRED)", outside, path, h.Peer.PID, h.Peer.UID)
	if h.PeerFD != fdpass.NoFD {
		what := "no network namespace"
		if h.NetNS != (netns.ID{}) {
			what = h.NetNS.String()
		}
		step(h.Judge, "%s recvmsg: byte %#02x, and a descriptor in SCM_RIGHTS: fd %d here, whatever its number was there; the kernel says it is %s", outside, handoff.Add, h.PeerFD, what)
	}
	if v := h.Added.Visit; v.Back != (netns.ID{}) {
		inside := fmt.Sprintf("[thread %d]", v.TID)
		step(v.Enter, "%s setns(%d, CLONE_NEWNET): %v -> %v", inside, h.PeerFD, v.Home, v.Inside)
		if h.Err == nil {
			var bound []string
			for i, fd := range h.Added.FDs {
				bound = append(bound, fmt.Sprintf("%v = fd %d", h.Added.Addrs[i], fd))
			}
			step(v.Work, "%s socket, bind, listen: %s", inside, strings.Join(bound, ", "))
			step(v.Leave, "%s setns back: %v -> %v; the sockets stay in the pod", inside, v.Inside, v.Back)
		} else {
			step(v.Work, "%s socket, bind, listen: it went wrong, nothing stays", inside)
			step(v.Leave, "%s setns back: %v -> %v", inside, v.Inside, v.Back)
		}
	}
	switch {
	case errors.Is(h.Err, handoff.ErrSilent):
		step(h.Duration, "%s the peer has left without a word", outside)
	case h.Err != nil:
		step(h.Duration, "%s reply: byte %#02x and %q; in all", outside, handoff.Refused, h.Err)
	case !h.Added.New:
		step(h.Duration, "%s reply: byte %#02x; the pod had its listeners already; in all", outside, handoff.Ready)
	default:
		step(h.Added.Watch, "%s epoll watches the listeners, from outside the pod", outside)
		step(h.Duration, "%s reply: byte %#02x, listeners ready; from the descriptor to here", outside, handoff.Ready)
	}
	io.WriteString(w, b.String()) // one write, so that handoffs do not mix
}
