package conformance

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

func isEnd(err error) bool { return err != nil && !errors.Is(err, os.ErrDeadlineExceeded) }

func (n *node) add() {
	n.hooked()
	z := n.joined()
	z.added(n.pod())
	z.added(n.pod())
	n.quiet(z.conn, silence, "after the ack of an add")
}

func (n *node) addNacked() {
	n.hooked()
	z := n.joined()
	p, q := n.pod(), n.pod()
	n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	z.nack("failure to start proxy : not today")
	n.tell(q)
	z.expectAdd(q, "after the nack of another pod's add")
	z.ack()
	n.stays(z, time.Second, "after the nack of an add")
}

func (n *node) addNackedWords() {
	n.hooked()
	z := n.joined()
	p := n.pod()
	h := n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	const words = "failure to start proxy : not today"
	z.nack(words)
	if !h.wait(2 * answerWithin) {
		n.broken("`%s` has not ended %v after the nack", h.text, 2*answerWithin)
	}
	if status, _ := h.exited(); status == 0 || !strings.Contains(h.tail.String(), words) {
		n.broken("`%s` has exited with status %d and does not say %q: %q", h.text, status, words, h.tail)
	}
}

func (n *node) addWaits() {
	n.hooked()
	z := n.joined()
	p, q := n.pod(), n.pod()
	n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	n.tell(q)
	n.quiet(z.conn, time.Second, "before the answer to an add, with another pod told")
	z.ack()
	z.expectAdd(q, "after the first one's ack")
	z.ack()
}

func (n *node) addInSnapshot() {
	n.hooked()
	n.withPods(1)
	z := n.connect()
	r := z.next(answerWithin, "after hello")
	p := n.pod()
	n.tell(p)
	n.quiet(z.conn, 2*silence, "before the answer to "+r.text+", with another pod told")
	z.ack()
	z.expectAdd(p, "told during the snapshot")
	z.ack()
	if !z.done {
		z.snapshot()
	}
}

func (n *node) del() {
	n.hooked()
	z := n.joined()
	p := n.pod()
	z.added(p)
	h := n.tellEnd(p)
	z.expectDel(p)
	z.ack()
	h.succeeds("a del that ztunnel has acked")

	q := n.pod()
	z.added(q)
	n.tellEnd(q)
	z.expectDel(q)
	z.nack("failure to start proxy : not today")
	n.stays(z, time.Second, "after the nack of a del")
}

func (z *ztunnel) expectDel(p *pod) {
	if r := z.expect(p, "after the agent was told of a pod's end"); r.GetDel() == nil {
		z.n.broken("a del of pod %s was expected, not %s", p.uid, r.text)
	}
}

func (n *node) delNobody() {
	n.hooked()
	pods := n.withPods(2)
	// It may take a probe to notice that nobody is there any more.
	n.wait(6*time.Second, "for the agent to notice that the ztunnel has left")
	n.tellEnd(pods[0]).succeeds("with no ztunnel connected")
	us := uids(n.connect().snapshot())
	if slices.Contains(us, pods[0].uid) {
		n.broken("pod %s is gone, and is in the snapshot: %v", pods[0].uid, us)
	}
	if !slices.Contains(us, pods[1].uid) {
		n.broken("pod %s is there, and is not in the snapshot: %v", pods[1].uid, us)
	}
}

func (n *node) twoAddNewest() {
	n.hooked()
	older, newest := n.joined(), n.joined()
	newest.added(n.pod())
	n.quiet(older.conn, time.Second, "with a newer ztunnel connected")
}

func (n *node) twoDelAll() {
	n.hooked()
	older, newest := n.joined(), n.joined()
	p := n.pod()
	newest.added(p)
	h := n.tellEnd(p)
	// Either may be asked first, and the other only after its answer.
	waiting := []*ztunnel{older, newest}
	for deadline := time.Now().Add(2 * answerWithin); len(waiting) > 0; {
		for i, z := range waiting {
			got, err := n.recvWithin(z.conn, 20*time.Millisecond)
			if isEnd(err) {
				n.broken("after the agent was told of a pod's end: a connection ended: %v", err)
			}
			if err != nil {
				continue
			}
			if r := z.judge(got); r.GetDel().GetUid() != p.uid {
				n.broken("a del of pod %s was expected, not %s", p.uid, r.text)
			}
			z.ack()
			waiting = slices.Delete(waiting, i, i+1)
			break
		}
		if time.Now().After(deadline) {
			who := "the older ztunnel"
			if waiting[0] == newest {
				who = "the newest ztunnel"
			}
			n.broken("%s was not told of the end of pod %s", who, p.uid)
		}
	}
	h.succeeds("a del that both ztunnels have acked")
}

func (n *node) twoNewestLeaves() {
	n.hooked()
	older, newest := n.joined(), n.joined()
	newest.conn.Close()
	for deadline := time.Now().Add(6 * time.Second); time.Now().Before(deadline); {
		n.stays(older, time.Until(deadline), "after the newest ztunnel has left")
	}
	older.added(n.pod())
}

func (n *node) lateAck() {
	n.hooked()
	z := n.joined()
	p := n.pod()
	n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	n.say("  waiting for the agent to lose patience")
	// A retry on the same connection would be taken for answered by the late ack.
	got, err := n.recvWithin(z.conn, 8*time.Second)
	got.close()
	switch {
	case errors.Is(err, io.EOF):
		return
	case err == nil:
		n.broken("with no answer to an add it sent %s on the same connection, so the late ack would be taken for the answer to that", got)
	case isEnd(err):
		n.broken("with no answer to an add: %v", err)
	}
	// Kept. Whose answer is the late one taken for?
	z.ack()
	q := n.pod()
	h := n.tell(q)
	z.expectAdd(q, "after a late ack")
	if h.wait(silence) {
		n.broken("the connection is kept 8 s after an add without an answer, and the late ack was taken for the answer to the next add")
	}
	n.broken("the connection is kept 8 s after an add without an answer")
}

func (n *node) updateGarbage() {
	n.hooked()
	z := n.joined()
	p := n.pod()
	n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	z.send([]byte{0x0a, 0xff})
	n.ended(z.conn, soon, "after the answer [0a ff] to an add")
}
