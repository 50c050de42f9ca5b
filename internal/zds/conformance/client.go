package conformance

import (
	"bytes"
	"time"

	"ambient-emulator/internal/zds"
)

// trials are the promises of a ztunnel. Those that end its process come last.
func (a *agent) trials() []trial {
	all := []trial{
		{Promise{ID: "hello", Says: "the first packet of a connection is hello, 08 01, and nothing follows unasked", Source: "zds.md §1, §2"}, a.sayHello},
		{Promise{ID: "idle", Says: "an agent that asks nothing hears nothing, and keeps its connection", Source: "zds.md §1"}, a.idle},
		{Promise{ID: "add", Says: "an add is acked with 0a 00, and then there are listeners on 15001, 15006 and 15008", Source: "zds.md §2, §5"}, a.add},
		{Promise{ID: "add-wildcard", Says: "the listeners are bound to the wildcard address", Source: "sockets.md §1"}, a.addWildcard},
		{Promise{ID: "add-1024", Says: "a request of 1024 bytes is read whole", Source: "zds.md §1"}, a.add1024},
		{Promise{ID: "add-empty-info", Says: "an add whose workload_info is there and empty is served", Source: "zds.md §2"}, a.addEmptyInfo},
		{Promise{ID: "add-repeat", Says: "a repeated add of a running uid and namespace is acked and changes nothing", Source: "zds.md §5"}, a.addRepeat},
		{Promise{ID: "order", Says: "requests that come in one go are answered once each, in order", Source: "zds.md §1"}, a.order},
		{Promise{ID: "keep-unknown", Says: "before the snapshot a keep is acked even for an unknown uid", Source: "zds.md §5"}, a.keepUnknown},
		{Promise{ID: "keep-wrong-field", Says: "a keep with its uid in field 2 keeps no pod", Source: "zds.md §2"}, a.keepWrongField},
		{Promise{ID: "del-unknown", Says: "a del of an unknown uid is acked, before and after the snapshot", Source: "zds.md §5"}, a.delUnknown},
		{Promise{ID: "del-before-snapshot", Says: "a del before the snapshot leaves a running pod alone until the snapshot", Source: "zds.md §5"}, a.delBefore},
		{Promise{ID: "del-after-snapshot", Says: "a del after the snapshot closes the pod's listeners", Source: "zds.md §5"}, a.delAfter},
		{Promise{ID: "del-wrong-field", Says: "a del with its uid in field 1 names no pod", Source: "zds.md §2"}, a.delWrongField},
		{Promise{ID: "readd", Says: "add, del and add again of one namespace leaves the pod served", Source: "zds.md §5"}, a.readd},
		{Promise{ID: "replace", Says: "the same uid with another namespace: served there, and no longer in the old one", Source: "zds.md §5"}, a.replace},
		{Promise{ID: "disconnected", Says: "pods stay served while there is no agent, and while a new snapshot is on its way", Source: "zds.md §5"}, a.disconnected},
		{Promise{ID: "reconcile", Says: "the snapshot ends what it did not name, and leaves what it kept or added as it was", Source: "zds.md §5"}, a.reconcile},
		{Promise{ID: "reconnect-in-snapshot", Says: "what a broken-off snapshot had named does not count in the next", Source: "zds.md §5"}, a.reconnectInSnapshot},
		{Promise{ID: "orderings", Says: "every ordering of add, keep and del around a snapshot, short ones all, ends as the event table says", Source: "zds.md §5"}, a.allOrderings},
		{Promise{ID: "start-failed", Says: "an add whose port is taken is nacked as a proxy that did not start; nothing stays bound and the connection stays open", Source: "zds.md §4"}, a.startFailed},
		{Promise{ID: "start-not-a-netns", Says: "an add with a descriptor that is no network namespace is a proxy that did not start, not a read failure", Source: "zds.md §3, §4"}, a.startNotNetns},
		{Promise{ID: "start-retry", Says: "a start that failed is tried again after 5 s, whatever comes in between, the snapshot included", Source: "zds.md §5, §6"}, a.startRetry},
		{Promise{ID: "start-retry-again", Says: "and again after 5 s more", Source: "zds.md §6"}, a.startRetryAgain},
		{Promise{ID: "pending-del", Says: "a del, before or after the snapshot, ends the retries", Source: "zds.md §5"}, a.pendingDel},
		{Promise{ID: "pending-moved", Says: "an add of the same uid that succeeds elsewhere ends the retries", Source: "zds.md §5, §11"}, a.pendingMoved},
		{Promise{ID: "pending-reconnect", Says: "a new connection forgets the starts that failed", Source: "zds.md §5"}, a.pendingReconnect},
		{Promise{ID: "redial", Says: "a lost connection is made again, also when the socket was gone for a while", Source: "zds.md §4, §6"}, a.redial},
		{Promise{ID: "redial-calm", Says: "an agent that accepts and closes is not dialled in a tight loop", Source: "zds.md §6", Improvement: true}, a.redialCalm},
	}
	all = append(all, a.readTrials()...)
	all = append(all, a.descriptorTrials()...)
	return append(all, a.exitTrials()...)
}

func (a *agent) sayHello() {
	a.fresh()
	if !bytes.Equal(a.hello.b, []byte{8, 1}) {
		a.broken("hello is %s, not [08 01]", a.hello)
	}
	a.quiet(a.conn, silence, "after hello and without a request")
}

func (a *agent) idle() {
	a.fresh()
	a.snapshot()
	a.say("  waiting 6 s: the client has nothing to say")
	a.quiet(a.conn, 6*time.Second, "idle after the snapshot")
	a.alive("after a long silence")
}

func (a *agent) add() {
	a.fresh()
	p, q := a.pod(), a.pod()
	a.serve(p)
	a.quiet(a.conn, silence, "after the ack of an add")
	a.snapshot()
	a.serve(q)
	a.quiet(a.conn, silence, "after the ack of an add")
}

func (a *agent) addWildcard() {
	a.fresh()
	p := a.pod()
	a.serve(p)
	for _, l := range p.listeners() {
		for _, port := range ports {
			if l.port == port && !l.wildcard {
				a.broken("port %d is not bound to the wildcard address", port)
			}
		}
	}
}

func (a *agent) add1024() {
	a.fresh()
	p := a.pod()
	a.ackRaw(padded(p, zds.MaxPacket, true), "add of 1024 bytes", p.ns.FD())
	p.served("after an add of 1024 bytes")
}

func (a *agent) addEmptyInfo() {
	a.fresh()
	p := a.pod()
	a.ack(zds.Add(p.uid, "", "", ""), p.ns.FD())
	p.served("after an add with an empty workload_info")
}

func (a *agent) addRepeat() {
	a.fresh()
	p := a.pod()
	before := a.serve(p)
	a.ack(p.add(), p.ns.FD())
	p.same(before, "after the same add again")
	a.ack(zds.Add(p.uid, "another-name", "another-namespace", "another"), p.ns.FD())
	p.same(before, "after an add of the same uid and namespace under another name")
	a.snapshot()
	a.ack(p.add(), p.ns.FD())
	p.same(before, "after the same add again, after the snapshot")
	a.fresh()
	a.ack(p.add(), p.ns.FD())
	p.same(before, "after the same add on a new connection")
}

func (a *agent) order() {
	a.fresh()
	good, bad := a.pod(), a.pod()
	bad.occupy(15006)
	a.request(good.add(), good.ns.FD())
	a.request(bad.add(), bad.ns.FD())
	a.request(zds.Keep(good.uid))
	a.request(zds.Snapshot())
	for i, refused := range []bool{false, true, false, false} {
		if nack := a.answer("one of four requests in one go"); (nack != "") != refused {
			a.broken("of add, add of a pod whose port is taken, keep, snapshot_sent in one go: answer %d is %q", i+1, nack)
		}
	}
	a.quiet(a.conn, silence, "after four answers to four requests")
}

func (a *agent) keepUnknown() {
	a.fresh()
	a.ack(zds.Keep(a.prefix + "-nobody"))
	a.snapshot()
	a.quiet(a.conn, silence, "after the snapshot")
}

func (a *agent) keepWrongField() {
	a.fresh()
	p := a.pod()
	a.serve(p)
	a.snapshot()
	a.fresh()
	a.ackRaw(uidField(5, 2, p.uid), "keep with its uid in field 2")
	a.snapshot()
	p.left("after a snapshot that kept it in the wrong field")
}

func (a *agent) delUnknown() {
	a.fresh()
	a.ack(zds.Del(a.prefix + "-nobody"))
	a.snapshot()
	a.ack(zds.Del(a.prefix + "-nobody"))
}

func (a *agent) delBefore() {
	a.fresh()
	p := a.pod()
	before := a.serve(p)
	a.ack(zds.Del(p.uid))
	a.wait(silence, "")
	p.same(before, "after a del before the snapshot")
	a.snapshot()
	p.left("after the snapshot that follows a del")
}

func (a *agent) delAfter() {
	a.fresh()
	p, other := a.pod(), a.pod()
	a.serve(p)
	before := a.serve(other)
	a.snapshot()
	a.ack(zds.Del(p.uid))
	p.left("after a del")
	other.same(before, "after the del of another pod")
	a.ack(zds.Del(p.uid))
}

func (a *agent) delWrongField() {
	a.fresh()
	p := a.pod()
	before := a.serve(p)
	a.snapshot()
	a.ackRaw(uidField(2, 1, p.uid), "del with its uid in field 1")
	a.wait(silence, "")
	p.same(before, "after a del with its uid in the wrong field")
}

func (a *agent) readd() {
	a.fresh()
	a.snapshot()
	p := a.pod()
	for range 5 {
		a.ack(p.add(), p.ns.FD())
		a.ack(zds.Del(p.uid))
	}
	a.serve(p)
	a.wait(silence, "")
	p.served("some time after add, del and add")
}

func (a *agent) replace() {
	a.fresh()
	old, now := a.pod(), a.pod()
	now.uid = old.uid
	a.serve(old)
	a.serve(now)
	old.left("after an add of the same uid with another namespace")
	a.snapshot()
	a.serve(old)
	now.left("after an add of the same uid with another namespace, after the snapshot")
	old.served("after that")
}
