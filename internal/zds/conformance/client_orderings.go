package conformance

import (
	"fmt"
	"strings"

	"ambient-emulator/internal/zds"
)

// ordering is one legal sequence of what an agent can say of one pod: before the
// connection, in the snapshot, after it. 1 and 2 are adds with one and with
// another namespace, k is a keep, d a del.
type ordering struct{ ran, pre, post string }

func (o ordering) String() string {
	return fmt.Sprintf("%s, then %s snapshot %s", map[string]string{"": "unknown", "1": "served"}[o.ran], spell(o.pre), spell(o.post))
}

func spell(s string) string {
	return strings.NewReplacer("1", "add(1) ", "2", "add(2) ", "k", "keep ", "d", "del ").Replace(s)
}

// orderings are all of them up to two words before the snapshot and one after, and
// up to one before and two after.
func orderings() []ordering {
	var all []ordering
	for _, ran := range []string{"", "1"} {
		for _, pre := range words("12kd", 2) {
			for _, post := range words("12d", 2) {
				if len(pre) < 2 || len(post) < 2 {
					all = append(all, ordering{ran, pre, post})
				}
			}
		}
	}
	return all
}

// words are all over an alphabet up to a length.
func words(alphabet string, length int) []string {
	all := []string{""}
	for from := 0; length > 0; length-- {
		to := len(all)
		for _, w := range all[from:to] {
			for _, letter := range alphabet {
				all = append(all, w+string(letter))
			}
		}
		from = to
	}
	return all
}

// model is ztunnel's state of one uid, with no start that fails (zds.md §5).
type model struct {
	runs  byte // 1 or 2, the namespace it is served in, or 0
	named bool // in this connection's snapshot
	done  bool // the snapshot has come
}

func (m *model) say(word byte) {
	switch word {
	case '1', '2':
		m.runs, m.named = word-'0', true
	case 'k':
		m.named = true
	case 'd':
		m.named = false
		if m.done {
			m.runs = 0
		}
	case 's':
		m.done = true
		if !m.named {
			m.runs = 0
		}
	}
}

// actor is a pod that goes through an ordering.
type actor struct {
	ordering
	model
	in [3]*pod // by namespace: 1, and 2 if it is ever said
}

// allOrderings sends them all, each of a pod of its own, in one snapshot.
func (a *agent) allOrderings() {
	var actors []*actor
	for _, o := range orderings() {
		c := &actor{ordering: o}
		c.in[1] = a.pod()
		if strings.Contains(o.pre+o.post, "2") {
			c.in[2] = a.pod()
			c.in[2].uid = c.in[1].uid
		}
		actors = append(actors, c)
	}
	a.fresh()
	for _, c := range actors {
		a.act(c, c.ran)
	}
	a.snapshot()
	a.fresh()
	for _, c := range actors {
		c.model = model{runs: c.runs}
		a.act(c, c.pre)
	}
	a.compare(actors, "before the snapshot")
	a.snapshot()
	for _, c := range actors {
		c.say('s')
	}
	a.compare(actors, "after the snapshot")
	for _, c := range actors {
		a.act(c, c.post)
	}
	a.compare(actors, "at the end")
	a.note = fmt.Sprintf("%d orderings", len(actors))
}

// act says some words of a pod, all of which are to be acked.
func (a *agent) act(c *actor, words string) {
	for _, word := range []byte(words) {
		c.say(word)
		switch word {
		case 'k':
			a.ack(zds.Keep(c.in[1].uid))
		case 'd':
			a.ack(zds.Del(c.in[1].uid))
		default:
			p := c.in[word-'0']
			a.ack(p.add(), p.ns.FD())
		}
	}
}

// compare holds each pod against its model. What ends is not awaited by the ack.
func (a *agent) compare(actors []*actor, when string) {
	for _, c := range actors {
		for i, p := range c.in {
			if p == nil {
				continue
			}
			want := 0
			if int(c.runs) == i {
				want = len(ports)
			}
			if !a.until(soon, func() bool { return len(p.sockets()) == want }) {
				a.broken("%s, %s: in namespace %d there are listeners on %v", c.ordering, when, i, keys(p.sockets()))
			}
		}
	}
}
