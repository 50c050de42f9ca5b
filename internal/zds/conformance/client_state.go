package conformance

import (
	"os"
	"time"

	"ambient-emulator/internal/zds"
)

func (a *agent) disconnected() {
	a.fresh()
	p := a.pod()
	before := a.serve(p)
	a.snapshot()
	a.hangUp()
	a.wait(time.Second, "with no agent")
	p.same(before, "after a second without an agent")
	a.fresh()
	a.ack(zds.Keep(a.prefix + "-nobody"))
	a.wait(silence, "")
	p.same(before, "before the snapshot of a new connection has ended")
}

func (a *agent) reconcile() {
	a.fresh()
	kept, again, gone := a.pod(), a.pod(), a.pod()
	k, g := a.serve(kept), a.serve(again)
	a.serve(gone)
	a.snapshot()
	a.fresh()
	a.ack(zds.Keep(kept.uid))
	a.ack(again.add(), again.ns.FD())
	a.snapshot()
	gone.left("after a snapshot that did not name it")
	kept.same(k, "after a snapshot that kept it")
	again.same(g, "after a snapshot that added it again")
	// It is as unknown now as if it had never been.
	a.serve(gone)
}

func (a *agent) reconnectInSnapshot() {
	a.fresh()
	p, q := a.pod(), a.pod()
	before := a.serve(p)
	a.serve(q)
	a.snapshot()
	a.fresh()
	a.ack(zds.Keep(p.uid))
	a.ack(zds.Keep(q.uid))
	a.hangUp() // in the middle of the snapshot
	a.fresh()
	a.ack(zds.Keep(p.uid))
	a.snapshot()
	q.left("named in a snapshot that broke off, and not in the next")
	p.same(before, "named in the snapshot")
}

func (a *agent) startFailed() {
	for _, port := range ports {
		a.fresh()
		p := a.pod()
		p.occupy(port)
		if cause := a.nack(nackStart, p.add(), p.ns.FD()); cause == "" {
			a.broken("the nack names no cause")
		}
		if ls := p.listeners(); len(ls) > 0 {
			a.broken("port %d is taken, and of the others these stay bound: %v", port, ls)
		}
		a.alive("after a start that failed")
		a.snapshot()
		a.nack(nackStart, p.add(), p.ns.FD())
		a.alive("after a start that failed, after the snapshot")
	}
}

func (a *agent) startNotNetns() {
	a.fresh()
	null, err := os.Open(os.DevNull)
	if err != nil {
		a.notTried("%v", err)
	}
	defer null.Close()
	p := a.pod()
	a.nack(nackStart, p.add(), int(null.Fd()))
	a.alive("after an add with a descriptor of /dev/null")
	a.serve(p)
}

// failed makes a pod whose start has failed, and frees its port.
func (a *agent) failed() *pod {
	p := a.pod()
	free := p.occupy(15008)
	a.nack(nackStart, p.add(), p.ns.FD())
	free()
	return p
}

func (a *agent) startRetry() {
	a.fresh()
	start := time.Now()
	p := a.failed()
	a.snapshot() // does not name pending pods out
	a.wait(2*time.Second, "for the retry")
	a.alive("while a start is pending")
	at := a.retried(p, start)
	if at < retryAfter-time.Second || at > retryAfter+1500*time.Millisecond {
		a.broken("it was tried again after %v, not after %v", at, retryAfter)
	}
	a.alive("after the retry")
}

// retried waits for the pod to be served and returns how long after start that was.
func (a *agent) retried(p *pod, start time.Time) time.Duration {
	a.say("  waiting for the retry")
	if !a.until(2*retryAfter, p.isServed) {
		a.broken("the pod is not served %v after its start failed, though its port is free", time.Since(start).Round(time.Second))
	}
	return time.Since(start).Round(10 * time.Millisecond)
}

func (a *agent) startRetryAgain() {
	a.fresh()
	start := time.Now()
	p := a.pod()
	free := p.occupy(15001)
	a.nack(nackStart, p.add(), p.ns.FD())
	a.wait(retryAfter+2*time.Second, "past the first retry, which fails too")
	free()
	if at := a.retried(p, start); at < 2*retryAfter-2*time.Second || at > 2*retryAfter+2*time.Second {
		a.broken("it was tried a second time after %v, not after %v", at, 2*retryAfter)
	}
}

func (a *agent) pendingDel() {
	a.fresh()
	before := a.failed()
	a.ack(zds.Del(before.uid))
	a.snapshot()
	after := a.failed()
	a.ack(zds.Del(after.uid))
	a.wait(retryAfter+1500*time.Millisecond, "for a retry that should not come")
	a.unserved(before, "a pod deleted before the snapshot while pending")
	a.unserved(after, "a pod deleted after the snapshot while pending")
}

func (a *agent) pendingMoved() {
	a.fresh()
	old, now := a.failed(), a.pod()
	now.uid = old.uid
	before := a.serve(now)
	a.wait(retryAfter+1500*time.Millisecond, "for a retry that should not come")
	a.unserved(old, "a namespace whose start failed before its uid was served in another")
	now.same(before, "after the time of a retry")
}

func (a *agent) pendingReconnect() {
	a.fresh()
	p := a.failed()
	a.fresh()
	a.wait(retryAfter+1500*time.Millisecond, "for a retry that should not come")
	a.unserved(p, "a pod that was pending on a connection that is gone")
}

func (a *agent) unserved(p *pod, what string) {
	if s := p.sockets(); len(s) > 0 {
		a.broken("%s has listeners on %v", what, keys(s))
	}
}

func (a *agent) redial() {
	a.fresh()
	before := a.pid
	start := time.Now()
	a.fresh()
	if d := time.Since(start); d > soon {
		a.broken("it dialled again only %v after the connection was lost", d.Round(time.Millisecond))
	}
	a.hangUp()
	if err := a.l.Close(); err != nil {
		a.notTried("%v", err)
	}
	a.wait(time.Second, "with the socket gone")
	if err := a.listen(); err != nil {
		a.notTried("%v", err)
	}
	start = time.Now()
	a.fresh()
	// The delay has doubled since 10 ms for a second: it is below two seconds.
	if d := time.Since(start); d > soon {
		a.broken("it dialled only %v after the socket was there again", d.Round(time.Millisecond))
	}
	a.sameProcess(before, "after the socket was gone for a while")
	a.alive("after the socket was gone for a while")
}

// calm is how many dials in two seconds are no loop: ztunnel's own back-off
// makes eight.
const calm = 20

func (a *agent) redialCalm() {
	dials := 0
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); dials++ {
		a.fresh()
	}
	a.fresh()
	a.alive("after an agent that accepts and closes")
	if dials > calm {
		a.broken("dialled %d times in 2 s, each time after a hello and the end of the connection", dials)
	}
	a.note = ""
}
