package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// MaxVerbs is how many verbs are served at once; the next ones wait in the
// backlog. Each may wait for a ztunnel for a while.
const MaxVerbs = 1024

// maxWait bounds what a verb may ask the agent to wait.
const maxWait = 24 * time.Hour

// lastWord is how long a verb may take to hear that the agent stops.
const lastWord = 100 * time.Millisecond

// errUnconfirmed marks what may yet come true.
var errUnconfirmed = errors.New("delivered, not confirmed")

// serveVerb serves one connection of a verb.
func (a *Agent) serveVerb(ctx context.Context, conn *net.UnixConn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		conn.SetReadDeadline(time.Unix(1, 0))
		conn.SetWriteDeadline(time.Now().Add(lastWord))
	})
	defer stop()
	hung := make(chan struct{})
	defer func() { conn.Close(); <-hung }()

	conn.SetDeadline(time.Now().Add(a.timeout))
	v := &verb{ctx: ctx, conn: conn, timeout: a.timeout}
	peer, err := uds.PeerOf(conn)
	if err != nil {
		close(hung)
		a.log.Warn("verb refused", "pid", peer.PID, "uid", peer.UID, "error", err)
		v.done(err)
		return
	}
	req, fd, err := control.ReadRequest(conn)
	if err != nil {
		close(hung)
		if !errors.Is(err, io.EOF) {
			v.done(fmt.Errorf("the request: %w", late(err)))
		}
		return
	}
	conn.SetReadDeadline(time.Time{})
	go watchHangup(conn, cancel, hung)
	v.done(a.do(ctx, v, req, fd))
}

// watchHangup reads where nothing may come but the end, which frees the verb's
// place however long it wanted to wait.
func watchHangup(conn *net.UnixConn, cancel func(), done chan<- struct{}) {
	defer close(done)
	_, fd, err := fdpass.Recv(conn, make([]byte, 1))
	if err == nil && fd != fdpass.NoFD {
		unix.Close(fd)
	}
	cancel()
}

// verb is the answering end of a verb's connection.
type verb struct {
	ctx     context.Context // ends with the agent, or when the verb hangs up
	conn    *net.UnixConn
	timeout time.Duration
	err     error // of the first reply that could not be sent; there is no second
}

// reply sends packets. All of them share one deadline: a verb that does not read
// costs that, however long its answer is. The caller stops at an error.
func (v *verb) reply(replies ...control.Reply) error {
	// In this order: whoever ends ctx shortens the deadline after that, so that
	// ours can't replace his.
	v.conn.SetWriteDeadline(time.Now().Add(v.timeout))
	if v.ctx.Err() != nil {
		return ErrStopping
	}
	return v.send(replies...)
}

func (v *verb) send(replies ...control.Reply) error {
	for _, r := range replies {
		if v.err != nil {
			break
		}
		v.err = control.WriteReply(v.conn, r)
	}
	return v.err
}

// done sends the last packet. A verb that has gone is no trouble of ours; one
// that waits hears even that the agent stops.
func (v *verb) done(err error) {
	r := control.Reply{Done: true}
	if err != nil {
		r.Error, r.Unconfirmed = err.Error(), errors.Is(err, errUnconfirmed)
	}
	v.conn.SetWriteDeadline(time.Now().Add(v.timeout))
	if v.ctx.Err() != nil {
		v.conn.SetWriteDeadline(time.Now().Add(lastWord))
	}
	v.send(r)
}

// do does what a verb asks. It owns fd.
func (a *Agent) do(ctx context.Context, v *verb, req control.Request, fd int) error {
	if fd != fdpass.NoFD && req.Verb != control.Add {
		unix.Close(fd)
		return fmt.Errorf("%s takes no descriptor", req.Verb)
	}
	wait := min(max(req.Wait, 0), maxWait)
	switch req.Verb {
	case control.Add:
		return a.doAdd(ctx, v, req.Pod, fd, wait)
	case control.Del:
		return a.doDel(ctx, req.Pod, wait)
	case control.List:
		var replies []control.Reply
		for _, p := range a.List() {
			replies = append(replies, control.Reply{Pod: &p})
		}
		return v.reply(replies...)
	case control.Status:
		status := a.Status()
		return v.reply(control.Reply{Agent: &status})
	}
	return fmt.Errorf("the agent knows no verb %q", req.Verb)
}

func (a *Agent) doAdd(ctx context.Context, v *verb, id control.PodID, fd int, wait time.Duration) error {
	if fd == fdpass.NoFD {
		return errors.New("no descriptor came with the request")
	}
	ns, err := netns.FromFD(fd) // takes fd
	if err != nil {
		return fmt.Errorf("the descriptor is refused: %w", err)
	}
	waiter := make(chan Outcome, 1)
	if wait == 0 {
		waiter = nil
	}
	h := newHandle(ns, a.log) // takes ns
	done, err := a.intend(ctx, id, h)
	if err != nil {
		h.release()
		return err
	}
	added, err := a.add(id, h, false, waiter) // takes h
	done()
	if err != nil {
		return err
	}
	defer a.unwait(id.UID, waiter)
	if added.Reset > 0 {
		if err := v.reply(control.Reply{Note: redirect.WillReset(added.Reset) + ": it is captured while it runs"}); err != nil {
			return err
		}
	}
	if wait == 0 {
		return a.onDisk(ctx)
	}
	if !added.Connected {
		if err := v.reply(control.Reply{Note: fmt.Sprintf("no ztunnel is connected; the pod is kept, and waits %v for one", wait)}); err != nil {
			return err
		}
	}
	select {
	case o := <-waiter:
		switch {
		case o.Err != nil:
			return o.Err
		case o.Nack != "":
			return fmt.Errorf("ztunnel (pid %d) says: %s", o.PID, o.Nack)
		}
		return a.onDisk(ctx)
	case <-time.After(wait):
		return fmt.Errorf("%w: no ztunnel has answered within %v%s; the pod is kept, see `cni-emulator list`", errUnconfirmed, wait, a.lastError(id.UID))
	case <-ctx.Done():
		return ErrStopping // or nobody reads this
	}
}

func (a *Agent) doDel(ctx context.Context, id control.PodID, wait time.Duration) error {
	uid, err := a.Find(id)
	if err != nil {
		return err
	}
	n, outcomes, rules, err := a.Delete(uid)
	switch {
	case err != nil:
		return err
	case wait == 0:
		return a.onDisk(ctx)
	}
	timeout := time.After(wait)
	var errs []error
	for i := range n {
		select {
		case o := <-outcomes:
			switch {
			case o.Nack != "":
				// The real agent ignores it; here it is a person who asked.
				errs = append(errs, fmt.Errorf("the agent has forgotten the pod, but ztunnel (pid %d) says: %s", o.PID, o.Nack))
			case ctx.Err() != nil, errors.Is(o.Err, net.ErrClosed):
				return ErrStopping // it was we who hung up
			case o.Err != nil && !zds.Gone(o.Err):
				// We dropped it. It may hang, and serve the pod for as long.
				errs = append(errs, fmt.Errorf("%w: ztunnel (pid %d) was dropped (%w), and may serve the pod until it connects again or ends", errUnconfirmed, o.PID, o.Err))
			}
		case <-timeout:
			return fmt.Errorf("%w: %d of %d ztunnels have not answered within %v", errUnconfirmed, n-i, n, wait)
		case <-ctx.Done():
			return ErrStopping
		}
	}
	if rules != nil {
		select {
		case err := <-rules:
			if err != nil {
				errs = append(errs, fmt.Errorf("the agent has forgotten the pod, but %w", err))
			}
		case <-timeout:
			return fmt.Errorf("%w: the pod's rules are not out of it within %v", errUnconfirmed, wait)
		case <-ctx.Done():
			return ErrStopping
		}
	}
	return errors.Join(append(errs, a.onDisk(ctx))...)
}

// lastError returns what went wrong with a pod, as a clause.
func (a *Agent) lastError(uid string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pods[uid]; p != nil && p.lastError != "" {
		return " (" + p.lastError + ")"
	}
	return ""
}

// Status tells how the agent is.
func (a *Agent) Status() control.Agent {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := control.Agent{
		PID: os.Getpid(), Since: a.since, ZDS: a.cfg.ZDS, Control: a.cfg.Control, State: a.cfg.State, Watch: a.cfg.Watch,
		NetNS: a.home.String(), Pods: len(a.pods), Ztunnels: []control.Ztunnel{},
	}
	for _, z := range a.ztunnels {
		row := control.Ztunnel{Ztunnel: z.number, PID: z.peer.PID, UID: z.peer.UID, Since: z.since, State: "snapshot", Queued: len(z.queue), Newest: z == a.newest()}
		if z.snapshot {
			row.State = "ready"
		}
		for _, said := range z.answers {
			if said.nack != "" {
				row.Nacked++
			} else {
				row.Acked++
			}
		}
		s.Ztunnels = append(s.Ztunnels, row)
	}
	return s
}
