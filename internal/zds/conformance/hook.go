package conformance

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// hooked begins a scene for which the agent has to be told of pods.
func (n *node) hooked() {
	if n.o.Add == "" || n.o.Del == "" {
		n.notTried("the agent has to be told of a pod: give --add and --del")
	}
}

// tell runs the hook that adds a pod. The pod's end is told after the scene.
func (n *node) tell(p *pod) *hook {
	p.b.later(func() {
		// The connections of the scene are gone by now, so it has nobody to wait for.
		h := n.hook(n.o.Del, p)
		h.wait(answerWithin)
		h.stop()
	})
	return n.started(n.o.Add, p)
}

// tellEnd runs the hook that deletes it.
func (n *node) tellEnd(p *pod) *hook { return n.started(n.o.Del, p) }

func (n *node) started(command string, p *pod) *hook {
	h := n.hook(command, p)
	n.later(h.stop)
	return h
}

func (n *node) hook(command string, p *pod) *hook {
	words := strings.NewReplacer("{uid}", p.uid, "{name}", p.name, "{namespace}", podNamespace, "{service-account}", podServiceAccount,
		"{netns}", "/proc/"+strconv.Itoa(os.Getpid())+"/fd/"+strconv.Itoa(p.ns.FD()))
	text := words.Replace(command)
	proc, err := startProcess([]string{"sh", "-c", text}, n.o.Output)
	if err != nil {
		n.notTried("run a hook: %v", err)
	}
	return &hook{n: n, text: text, process: proc}
}

// hook is a command that tells the agent something. It may wait until a ztunnel
// has answered, so it runs beside the scene.
type hook struct {
	*process
	n    *node
	text string
}

// wait waits for its end, and tells whether that came.
func (h *hook) wait(within time.Duration) bool {
	select {
	case <-h.done:
		return true
	case <-time.After(within):
		return false
	case <-h.n.ctx.Done():
		return false
	}
}

// succeeds makes sure that it ends well.
func (h *hook) succeeds(when string) {
	if !h.wait(2 * answerWithin) {
		h.n.broken("%s: `%s` has not ended after %v", when, h.text, 2*answerWithin)
	}
	if status, _ := h.exited(); status != 0 {
		h.n.broken("%s: `%s` has exited with status %d: %s", when, h.text, status, h.tail)
	}
}

// added tells of a pod and acks it at z.
func (z *ztunnel) added(p *pod) {
	h := z.n.tell(p)
	z.expectAdd(p, "after the agent was told of a pod")
	z.ack()
	h.succeeds("a pod that ztunnel has acked")
}

// withPods gives the agent pods for a scene about its snapshot, where we can.
func (n *node) withPods(count int) []*pod {
	var ps []*pod
	if n.o.Add == "" || n.o.Del == "" {
		return nil
	}
	z := n.joined()
	for range count {
		p := n.pod()
		z.added(p)
		ps = append(ps, p)
	}
	z.conn.Close()
	return ps
}
