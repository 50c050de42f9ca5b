package conformance

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"ambient-emulator/internal/zds"
)

// trials are the promises of an agent.
func (n *node) trials() []trial {
	return []trial{
		{Promise{ID: "waits-for-hello", Says: "nothing is sent before hello", Source: "zds.md §1"}, n.waitsForHello},
		{Promise{ID: "snapshot", Says: "hello is answered with an add or a keep for each pod, one descriptor of a network namespace with each add, then snapshot_sent, 1a 00", Source: "zds.md §2, istio-cni.md §4"}, n.snapshot},
		{Promise{ID: "one-outstanding", Says: "the next request of a snapshot is not sent before the last is answered", Source: "zds.md §1"}, n.oneOutstanding},
		{Promise{ID: "idle", Says: "after the snapshot nothing is sent unasked, no keep ever, and the connection stays", Source: "zds.md §1, istio-cni.md §4"}, n.idle},
		{Promise{ID: "nack-in-snapshot", Says: "a nack in the snapshot is passed over and the connection stays", Source: "istio-cni.md §4"}, n.nackInSnapshot},
		{Promise{ID: "hello-version", Says: "the version in hello is not judged", Source: "istio-cni.md §4"}, n.helloVersion},
		{Promise{ID: "hello-silent", Says: "a ztunnel that never says hello is closed after 5 s", Source: "istio-cni.md §4"}, n.helloSilent},
		{Promise{ID: "hello-garbage", Says: "a hello that does not parse ends the connection", Source: "istio-cni.md §4"}, n.helloGarbage},
		{Promise{ID: "hello-oversize", Says: "a hello of more than 1024 bytes ends the connection", Source: "istio-cni.md §4"}, n.helloOversize},
		{Promise{ID: "ack-silent", Says: "a ztunnel that never answers in the snapshot is closed after 5 s", Source: "istio-cni.md §4"}, n.ackSilent},
		{Promise{ID: "ack-garbage", Says: "an answer that does not parse ends the snapshot and the connection", Source: "istio-cni.md §4"}, n.ackGarbage},
		{Promise{ID: "ack-oversize", Says: "an answer of more than 1024 bytes ends the snapshot and the connection", Source: "istio-cni.md §4"}, n.ackOversize},
		{Promise{ID: "ack-1024", Says: "a nack of 1024 bytes is read", Source: "zds.md §1"}, n.ack1024},
		{Promise{ID: "unsolicited", Says: "an answer that nobody asked for ends the connection", Source: "zds.md §1, istio-cni.md §4"}, n.unsolicited},
		{Promise{ID: "reconnect-in-snapshot", Says: "a ztunnel that leaves in the snapshot and comes back gets a whole new one", Source: "istio-cni.md §4"}, n.reconnectInSnapshot},
		{Promise{ID: "descriptors", Says: "a descriptor that a ztunnel sends is closed", Source: "zds.md §1", Improvement: true}, n.descriptorsClosed},
		{Promise{ID: "add", Says: "a new pod is told at once, with its uid, name, namespace, service account and network namespace", Source: "istio-cni.md §4"}, n.add},
		{Promise{ID: "add-nacked", Says: "a nack of an add leaves the connection as it is", Source: "istio-cni.md §4"}, n.addNacked},
		{Promise{ID: "add-nacked-words", Says: "who added the pod is told ztunnel's own words", Source: "the command line", Improvement: true}, n.addNackedWords},
		{Promise{ID: "add-waits", Says: "of two adds at the same time the second waits for the first one's ack", Source: "zds.md §1"}, n.addWaits},
		{Promise{ID: "add-in-snapshot", Says: "a pod that comes during the snapshot is told too, before or after snapshot_sent", Source: "istio-cni.md §4"}, n.addInSnapshot},
		{Promise{ID: "del", Says: "a pod's end is told with a del, uid in field 2, no descriptor", Source: "zds.md §2"}, n.del},
		{Promise{ID: "del-nobody", Says: "a pod's end with no ztunnel connected is a success, and the pod is in no later snapshot", Source: "istio-cni.md §4"}, n.delNobody},
		{Promise{ID: "two-add-newest", Says: "with two ztunnels an add goes to the newest alone", Source: "zds.md §1"}, n.twoAddNewest},
		{Promise{ID: "two-del-all", Says: "with two ztunnels a del goes to both", Source: "zds.md §1"}, n.twoDelAll},
		{Promise{ID: "two-newest-leaves", Says: "when the newest ztunnel leaves, adds go to the one before it", Source: "istio-cni.md §4"}, n.twoNewestLeaves},
		{Promise{ID: "late-ack", Says: "an ack that takes more than 5 s ends the connection, so it is never taken for the answer to another request", Source: "istio-cni.md §4, §15", Improvement: true}, n.lateAck},
		{Promise{ID: "update-garbage", Says: "an answer to an update that does not parse ends the connection", Source: "istio-cni.md §4", Improvement: true}, n.updateGarbage},
	}
}

func (n *node) waitsForHello() {
	z := n.dial()
	n.quiet(z.conn, 2*silence, "before hello")
	z.send([]byte{8, 1})
	z.next(answerWithin, "after hello")
}

func (n *node) snapshot() {
	pods := n.withPods(3)
	z := n.connect()
	all := z.snapshot()
	us := uids(all)
	if len(slices.Compact(slices.Clone(us))) != len(us) {
		n.broken("a uid came twice in one snapshot: %v", us)
	}
	for _, p := range pods {
		i := slices.IndexFunc(all, func(r request) bool { return r.uid() == p.uid })
		if i < 0 {
			n.broken("pod %s is not in the snapshot %v", p.uid, us)
		}
		n.isAddOf(all[i], p)
	}
	for _, r := range all {
		i := r.GetAdd().GetWorkloadInfo()
		if r.GetAdd() != nil && (i.Name == "" || i.Namespace == "" || i.ServiceAccount == "") {
			n.broken("%s: name, namespace and service account are all set in a real pod", r.text)
		}
		if r.GetDel() != nil {
			n.broken("%s: a del in the snapshot, with no pod deleted", r.text)
		}
	}
	if pods == nil {
		n.note = fmt.Sprintf("only with the %d pods that the agent knew; --add and --del would give it some", len(us))
	}
}

func (n *node) oneOutstanding() {
	n.withPods(2)
	z := n.connect()
	for i := 0; !z.done; i++ {
		r := z.next(answerWithin, "in the snapshot")
		if i == 0 && z.done {
			n.notTried("the agent has no pod, so there is nothing to hold back: give --add and --del")
		}
		if i < 3 || z.done {
			n.quiet(z.conn, 2*silence, "before the answer to "+r.text)
		}
		z.ack()
	}
}

func (n *node) idle() {
	pods := n.withPods(1)
	z := n.joined()
	n.say("  waiting 11 s: two probes of an idle connection")
	n.quiet(z.conn, 11*time.Second, "idle after the snapshot")
	if pods != nil {
		z.added(n.pod())
	}
}

func (n *node) nackInSnapshot() {
	n.withPods(2)
	z := n.connect()
	z.snapshotWith(func(r request) { z.nack("failure to start proxy : not today") })
	// What was refused may be tried again by now.
	n.stays(z, time.Second, "after a snapshot of nacks")
}

// stays makes sure that the connection does; what comes is judged and acked.
func (n *node) stays(z *ztunnel, d time.Duration, when string) {
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		p, err := n.recvWithin(z.conn, time.Until(deadline))
		if err == nil {
			z.judge(p)
			z.ack()
		} else if isEnd(err) {
			n.broken("%s: the connection ended: %v", when, err)
		}
	}
}

func (n *node) helloVersion() {
	z := n.dial()
	z.send([]byte{8, 7})
	z.snapshot()
	n.quiet(z.conn, silence, "after the snapshot of a ztunnel of version 7")
}

func (n *node) helloSilent() {
	z := n.dial()
	n.say("  waiting for the agent to lose patience")
	n.fiveSeconds(n.ended(z.conn, 10*time.Second, "with no hello"), "with no hello")
}

// fiveSeconds judges a deadline of the agent's.
func (n *node) fiveSeconds(d time.Duration, when string) {
	if d < 4*time.Second || d > 8*time.Second {
		n.broken("%s, the connection was ended after %v, not after 5 s", when, d.Round(10*time.Millisecond))
	}
}

func (n *node) helloGarbage() {
	z := n.dial()
	z.send([]byte{0x0a, 0xff})
	n.ended(z.conn, soon, "after a hello of [0a ff]")
}

func (n *node) helloOversize() {
	z := n.dial()
	// Decodes, cut or whole: only the flag tells.
	z.send(slices.Repeat([]byte{8, 1}, zds.MaxPacket/2+1))
	n.ended(z.conn, soon, "after a hello of 1026 bytes")
}

func (n *node) ackSilent() {
	z := n.connect()
	r := z.next(answerWithin, "after hello")
	n.say("  waiting for the agent to lose patience")
	n.fiveSeconds(n.ended(z.conn, 10*time.Second, "with no answer to "+r.text), "with no answer")
}

func (n *node) ackGarbage() {
	z := n.connect()
	r := z.next(answerWithin, "after hello")
	z.send([]byte{0x0a, 0xff})
	n.ended(z.conn, soon, "after the answer [0a ff] to "+r.text)
}

// long is a nack of exactly that many bytes.
func long(size int) []byte {
	for i := size; ; i-- {
		b := encode(&zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: strings.Repeat("x", i)}}})
		if len(b) == size {
			return b
		}
	}
}

func (n *node) ackOversize() {
	z := n.connect()
	r := z.next(answerWithin, "after hello")
	z.send(long(zds.MaxPacket + 1))
	n.ended(z.conn, soon, "after an answer of 1025 bytes to "+r.text)
}

func (n *node) ack1024() {
	z := n.connect()
	z.snapshotWith(func(request) { z.send(long(zds.MaxPacket)) })
	n.stays(z, time.Second, "after a snapshot of nacks of 1024 bytes")
}

func (n *node) unsolicited() {
	z := n.joined()
	n.quiet(z.conn, silence, "after the snapshot")
	z.ack()
	n.say("  waiting for the agent to notice, at its next probe")
	n.ended(z.conn, 8*time.Second, "after an ack that nobody asked for")
}

func (n *node) reconnectInSnapshot() {
	n.withPods(3)
	whole := n.connect()
	want := uids(whole.snapshot())
	whole.conn.Close()
	if len(want) == 0 {
		n.notTried("the agent has no pod, so its snapshot has no middle: give --add and --del")
	}
	for acked := range 2 {
		z := n.connect()
		z.next(answerWithin, "after hello")
		for range acked {
			z.ack()
			z.next(answerWithin, "after an ack in the snapshot")
		}
		z.conn.Close() // with its last request unanswered

		again := n.connect()
		if us := uids(again.snapshot()); !slices.Equal(us, want) {
			n.broken("a whole snapshot names %v; one broke off after %d acks, and the next names %v", want, acked, us)
		}
		again.conn.Close()
	}
}

func (n *node) descriptorsClosed() {
	p := n.pod()
	z := n.connect()
	n.descriptors(n.pid, p.ns.ID()) // or it is not tried
	z.next(answerWithin, "after hello")
	sendPacket(z.conn, encode(zds.Response("")), p.ns.FD(), p.ns.FD())
	n.wait(silence, "") // until it has been received
	n.letGo(n.pid, p.ns.ID(), 0, "after an answer with two descriptors")
	h := n.dial()
	sendPacket(h.conn, []byte{8, 1}, p.ns.FD())
	n.wait(silence, "")
	n.letGo(n.pid, p.ns.ID(), 0, "after a hello with a descriptor")
}
