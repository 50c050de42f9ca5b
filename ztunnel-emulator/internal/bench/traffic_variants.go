package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// variant is what stands between the client and the server: the two are always
// the same.
type variant struct {
	name  string
	sides []side // where something stands, and the pod is captured
	start func(ctx context.Context, b *bed, s side) (*standing, error)
}

func (v variant) relays() bool { return len(v.sides) > 0 }

// standing is what a variant has set up on one side.
type standing struct {
	relay *process // whose costs are counted
	undo  []func() error
}

// stop undoes it, the last thing first.
func (s *standing) stop() (err error) {
	for i := len(s.undo) - 1; i >= 0; i-- {
		err = errors.Join(err, s.undo[i]())
	}
	return err
}

// comparison is what is held against what.
type comparison struct {
	name                string
	measured, floor     variant
	throughput, latency float64 // the aims
}

var noMesh = variant{name: "no mesh"}

var comparisons = []comparison{
	{
		name:       "outbound",
		measured:   variant{"ztunnel, outbound", []side{clientSide}, startZtunnel},
		floor:      variant{"floor, outbound", []side{clientSide}, startFloor},
		throughput: 0.85, latency: 1.35,
	},
	{
		name:       "both sides",
		measured:   variant{"ztunnel, both sides", []side{clientSide, serverSide}, startZtunnel},
		floor:      variant{"floor, both sides", []side{clientSide, serverSide}, startFloor},
		throughput: 0.85, latency: 1.35,
	},
}

// chosen are the variants to measure, each once.
func (b *bed) chosen() []variant {
	all := []variant{noMesh}
	for _, c := range comparisons {
		all = append(all, c.floor, c.measured)
	}
	var some []variant
	for _, v := range all {
		if strings.Contains(v.name, b.traffic.only) {
			some = append(some, v)
		}
	}
	return some
}

// startZtunnel captures the pod of a side with the two programs, one of each on
// the node.
func startZtunnel(ctx context.Context, b *bed, s side) (*standing, error) {
	return startPair(ctx, b, s, nil)
}

// startPair is startZtunnel, with what ztunnel shall have in its environment and as
// flags besides.
func startPair(ctx context.Context, b *bed, s side, env []string, flags ...string) (_ *standing, err error) {
	st := &standing{}
	defer func() {
		if err != nil {
			err = errors.Join(err, st.stop())
		}
	}()
	zds, control := filepath.Join(b.dir, s.node()+"-zds"), filepath.Join(b.dir, s.node()+"-control")
	agent, err := b.start(ctx, s.node(), "agent", b.cni, "serve", "--zds-uds", zds, "--control-uds", control, "--capture", "redirect")
	if err != nil {
		return nil, err
	}
	st.undo = append(st.undo, agent.stop)
	if _, err := agent.await("listening for verbs"); err != nil {
		return nil, err
	}
	ztunnel := append(append([]string{"env"}, env...), b.ztunnel, "--inpod-uds", zds)
	st.relay, err = b.start(ctx, s.node(), "ztunnel", append(ztunnel, flags...)...)
	if err != nil {
		return nil, err
	}
	st.undo = append(st.undo, st.relay.stop)
	if _, err := agent.await("snapshot sent"); err != nil {
		return nil, err
	}
	if err := b.command(ctx, s.node(), b.cni, "add", s.pod(), "--service-account", s.pod(), "--netns", pathOf(s.pod()), "--control-uds", control).Run(); err != nil {
		return nil, fmt.Errorf("add %s: %w", s.pod(), err)
	}
	st.undo = append(st.undo, func() error {
		return b.command(context.Background(), s.node(), b.cni, "del", s.pod(), "--control-uds", control).Run()
	})
	_, err = st.relay.await("pod served")
	return st, err
}

// startFloor captures the pod of a side with the same rules, for the floor.
func startFloor(ctx context.Context, b *bed, s side) (*standing, error) {
	return startInPod(ctx, b, s, "relay")
}

// startInPod captures the pod of a side for a part of this program.
func startInPod(ctx context.Context, b *bed, s side, part string, args ...string) (_ *standing, err error) {
	st := &standing{}
	defer func() {
		if err != nil {
			err = errors.Join(err, st.stop())
		}
	}()
	if st.relay, err = b.start(ctx, s.pod(), part, append([]string{b.self, part}, args...)...); err != nil {
		return nil, err
	}
	st.undo = append(st.undo, st.relay.stop)
	if _, err := st.relay.await("relaying"); err != nil {
		return nil, err
	}
	if err := b.command(ctx, s.node(), b.cni, "rules", "install", "--netns", pathOf(s.pod()), "--capture", "redirect").Run(); err != nil {
		return nil, fmt.Errorf("install rules: %w", err)
	}
	st.undo = append(st.undo, func() error {
		return b.command(context.Background(), s.node(), b.cni, "rules", "remove", "--netns", pathOf(s.pod())).Run()
	})
	return st, nil
}
