// Package conformance holds either half of ZDS to its promises, over the socket
// alone: it plays the agent to a ztunnel that dials, or ztunnels to an agent
// that listens, says every legal and illegal thing that the protocol has words
// for, and reports what was kept and how the rest differed.
//
// The half under test is a process, of any make. A promise is a function that
// plays one scene; the pods in it are network namespaces made for that scene,
// so the suite sees with its own eyes whether there are listeners in them.
package conformance

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"path"
	"runtime"
	"time"

	"ambient-emulator/internal/netns"
)

// Promise is one thing that a half does.
type Promise struct {
	ID     string `json:"id"`
	Says   string `json:"promise"`
	Source string `json:"source"` // sheet and section
	// Improvement marks what the real half does not do and the emulators do on
	// purpose. Another half that does not keep it differs; it breaks nothing.
	Improvement bool `json:"improvement,omitempty"`
}

// Status is what became of a promise.
type Status string

// The four of them. Differs is for an improvement that is not made.
const (
	Kept     Status = "kept"
	Broken   Status = "broken"
	Differs  Status = "differs"
	NotTried Status = "not tried"
)

// Result is a promise and what became of it.
type Result struct {
	Promise
	Status Status  `json:"status"`
	Why    string  `json:"why,omitempty"` // how it differed, or why it was not tried
	Took   float64 `json:"seconds"`
}

// Options says what is tested, and how.
type Options struct {
	Path string // of the socket

	// Command starts the half under test, and again after it has exited. Empty:
	// somebody else has started it.
	Command []string
	// Output receives what Command prints, or nil.
	Output io.Writer
	// Restarts says that somebody else starts a client again when it exits.
	Restarts bool

	// Add and Del are shell commands that tell an agent of a pod and of its end,
	// with the words {uid} {name} {namespace} {service-account} {netns}.
	Add, Del string

	Only     []string      // patterns of the ids to try (path.Match), all if empty
	Strict   bool          // improvements are promises
	Wait     time.Duration // for the half under test to appear
	Progress io.Writer     // told what is going on, or nil
}

// Report is what came of a run.
type Report struct {
	Target  string   `json:"target"`
	Results []Result `json:"results"`
}

// Count returns how many promises have a status.
func (r *Report) Count(s Status) int {
	n := 0
	for _, res := range r.Results {
		if res.Status == s {
			n++
		}
	}
	return n
}

// trial is one promise and the scene that tries it.
type trial struct {
	Promise
	play func()
}

// verdict ends a scene early. It travels as a panic, which run alone recovers,
// so that a scene reads as what is said and what is expected.
type verdict struct {
	status Status
	why    string
}

// run plays the scenes in order and stops early only with ctx, or if there is nobody
// to be tested. The bench is
// given back to each scene as the one before found it.
func (b *bench) run(target string, trials []trial) (*Report, error) {
	if err := netns.Probe(); err != nil {
		return nil, fmt.Errorf("pods are made as network namespaces, which takes CAP_SYS_ADMIN: %w; run it as root, or in scripts/private", err)
	}
	r := &Report{Target: target}
	chosen, err := choose(trials, b.o.Only)
	if err != nil {
		return nil, err
	}
	for i, t := range chosen {
		b.say("[%d/%d] %s: %s", i+1, len(chosen), t.ID, t.Says)
		start := time.Now()
		res := Result{Promise: t.Promise}
		res.Status, res.Why = b.try(t)
		res.Took = time.Since(start).Round(time.Millisecond).Seconds()
		if err := cmp.Or(b.ctx.Err(), b.absent); err != nil {
			return r, err
		}
		if res.Status != Kept {
			b.say("  %s: %s", res.Status, res.Why)
		}
		r.Results = append(r.Results, res)
	}
	return r, nil
}

// try plays one scene and clears the stage.
func (b *bench) try(t trial) (status Status, why string) {
	b.id, b.pods = t.ID, 0
	defer b.clear()
	defer func() {
		switch v := recover().(type) {
		case nil:
		case verdict:
			status, why = v.status, v.why
			if status == Broken && t.Improvement && !b.o.Strict {
				status = Differs
			}
		case runtime.Error: // a mistake of ours: never hide it
			panic(v)
		default:
			panic(v)
		}
	}()
	b.note = ""
	t.play()
	return Kept, b.note
}

func choose(trials []trial, only []string) ([]trial, error) {
	if len(only) == 0 {
		return trials, nil
	}
	var chosen []trial
	for _, t := range trials {
		for _, pattern := range only {
			ok, err := path.Match(pattern, t.ID)
			if err != nil {
				return nil, fmt.Errorf("pattern %q: %w", pattern, err)
			}
			if ok {
				chosen = append(chosen, t)
				break
			}
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no promise is called %q", only)
	}
	return chosen, nil
}

// Client tries a ztunnel, which dials o.Path; the suite listens there.
func Client(ctx context.Context, o Options) (*Report, error) {
	a := newAgent(ctx, o)
	defer a.end()
	if err := a.listen(); err != nil {
		return nil, err
	}
	return a.run("client:"+o.Path, a.trials())
}

// Server tries an agent, which listens at o.Path; the suite dials it.
func Server(ctx context.Context, o Options) (*Report, error) {
	n := newNode(ctx, o)
	defer n.end()
	if err := n.meet(); err != nil {
		return nil, err
	}
	return n.run("server:"+o.Path, n.trials())
}

// ClientPromises and ServerPromises list what is tried, in order.
func ClientPromises() []Promise { return promises(newAgent(context.Background(), Options{}).trials()) }

// ServerPromises lists what is tried of an agent.
func ServerPromises() []Promise { return promises(newNode(context.Background(), Options{}).trials()) }

func promises(trials []trial) []Promise {
	var ps []Promise
	for _, t := range trials {
		ps = append(ps, t.Promise)
	}
	return ps
}
