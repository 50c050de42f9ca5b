package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// trafficOptions are for the part that measures traffic.
type trafficOptions struct {
	world  string        // the script
	rounds int           // of all variants in turns
	each   time.Duration // for each number
	trips  int           // round trips
	idle   int           // connections
	only   string
}

func (o *trafficOptions) flags() {
	flag.StringVar(&o.world, "world", "scripts/world", "the `script` that makes nodes and pods")
	flag.IntVar(&o.rounds, "traffic-rounds", 5, "how many rounds of traffic, each through all variants")
	flag.DurationVar(&o.each, "traffic-each", time.Second, "how long to measure throughput, for each number of streams, and connections")
	flag.IntVar(&o.trips, "traffic-trips", 10000, "how many round trips to measure")
	flag.IntVar(&o.idle, "traffic-idle", 2000, "how many idle connections to hold")
	flag.StringVar(&o.only, "traffic-only", "", "only variants whose name has this `word`")
}

// bed is where traffic flows: a pod on each of two nodes, made by scripts/world.
type bed struct {
	options
	self string // this program
}

// The world's names and addresses: one pod on each node.
const (
	clientSide = side(0)
	serverSide = side(1)
	serverAddr = "10.0.3.3"
)

// side is one of the two nodes with its pod.
type side int

func (s side) pod() string  { return [...]string{"pod2", "pod3"}[s] }
func (s side) node() string { return [...]string{"node2", "node3"}[s] }

func netnsOf(name string) string { return "world-" + name }
func pathOf(name string) string  { return filepath.Join("/var/run/netns", netnsOf(name)) }

// start runs a program in a namespace of the world, in the background.
func (b *bed) start(ctx context.Context, ns string, log string, args ...string) (*process, error) {
	file := filepath.Join(b.dir, ns+"-"+log+".log")
	return startLogged(ctx, file, "ip", append([]string{"netns", "exec", netnsOf(ns)}, args...)...)
}

// command is one in a namespace of the world that ends by itself.
func (b *bed) command(ctx context.Context, ns string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", netnsOf(ns)}, args...)...)
	cmd.Stderr = os.Stderr
	return cmd
}

// trafficRound is what one variant did in one round.
type trafficRound struct {
	throughput [len(streams)]float64 // bytes a second
	cpu        float64               // of what relays, seconds a GiB
	trips      float64               // round trips a second
	p50, p99   float64               // of them, seconds
	tripCPU    float64               // of what relays, seconds for one
	conns      float64               // new connections a second
	failed     float64               // of them, in all
	idle       held
	// With a mesh: the same where each connection has a tunnel of its own.
	connsApart float64
	idleApart  held
}

// held is what one idle connection costs, on the average.
type held struct{ resident, files float64 }

// streams are the numbers of connections that carry bytes at once.
var streams = [...]int{1, 2, 8}

// runTraffic measures all variants in turns and returns the tables.
func runTraffic(ctx context.Context, o options) (table string, err error) {
	b := &bed{options: o}
	if b.self, err = os.Executable(); err != nil {
		return "", err
	}
	chosen := b.chosen()
	rounds := make(map[string][]trafficRound)
	for i := range b.traffic.rounds {
		note("relay, round %d of %d", i+1, b.traffic.rounds)
		for j := range chosen {
			v := chosen[(i+j)%len(chosen)] // nobody is always the one who comes after the other
			r, err := b.round(ctx, v)
			if err != nil {
				return "", fmt.Errorf("%s: %w", v.name, err)
			}
			rounds[v.name] = append(rounds[v.name], r)
		}
	}
	return trafficTable(o.traffic, rounds), nil
}

// round measures a variant with fresh processes: two times, because what carried
// traffic has memory at hand for idle connections.
func (b *bed) round(ctx context.Context, v variant) (r trafficRound, err error) {
	err = b.standing(ctx, v, func(relays []*process) error { return b.carry(ctx, &r, relays) })
	if err == nil && v.relays() {
		err = b.standing(ctx, v, func(relays []*process) (err error) {
			r.idle, err = b.hold(ctx, b.traffic.idle, relays)
			return err
		})
	}
	return r, err
}

// standing sets a variant up in a fresh world, calls f, and takes all down. In a
// world that was used before, connection tracking knows ports from another time
// and treats who has them next as it did then.
func (b *bed) standing(ctx context.Context, v variant, f func(relays []*process) error) (err error) {
	if _, err := b.world(ctx, "up", "--nodes", "2", "--pods", "1"); err != nil {
		return err
	}
	defer func() {
		_, derr := b.world(context.Background(), "down")
		err = errors.Join(err, derr)
	}()
	server, err := b.start(ctx, serverSide.pod(), "server", b.self, "server")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	if _, err := server.await("serving"); err != nil {
		return err
	}
	var up []*standing
	var relays []*process
	for _, s := range v.sides {
		var st *standing
		if st, err = v.start(ctx, b, s); err != nil {
			break
		}
		up = append(up, st)
		relays = append(relays, st.relay)
	}
	if err == nil {
		err = f(relays)
	}
	for _, st := range up {
		err = errors.Join(err, st.stop())
	}
	return err
}

// world runs the script and returns what it says.
func (b *bed) world(ctx context.Context, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, b.traffic.world, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", b.traffic.world, args[0], err, out)
	}
	return out, err
}

// carry measures everything that moves.
func (b *bed) carry(ctx context.Context, r *trafficRound, relays []*process) error {
	before, err := ticksOf(relays)
	if err != nil {
		return err
	}
	moved := 0.0
	for i, n := range streams {
		got, err := b.client(ctx, "stream", fmt.Sprint(n), b.traffic.each.String())
		if err != nil {
			return err
		}
		r.throughput[i] = got.Count / got.Seconds
		moved += got.Count
	}
	after, err := ticksOf(relays)
	if err != nil {
		return err
	}
	r.cpu = float64(after-before) / 100 / (moved / (1 << 30))
	got, err := b.client(ctx, "trips", fmt.Sprint(b.traffic.trips))
	if err != nil {
		return err
	}
	r.trips, r.p50, r.p99 = got.Count/got.Seconds, got.P50, got.P99
	afterTrips, err := ticksOf(relays)
	if err != nil {
		return err
	}
	r.tripCPU = float64(afterTrips-after) / 100 / got.Count
	got, err = b.client(ctx, "connect", fmt.Sprint(connecting), b.traffic.each.String())
	if err != nil {
		return err
	}
	r.conns, r.failed = got.Count/got.Seconds, got.Failed
	return nil
}

// hold measures what n connections cost, each, that have carried a little and carry
// nothing now.
func (b *bed) hold(ctx context.Context, n int, relays []*process) (held, error) {
	before, err := lookAt(relays)
	if err != nil {
		return held{}, err
	}
	cmd := b.command(ctx, clientSide.pod(), b.self, "client", "idle", fmt.Sprint(n))
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return held{}, err
	}
	if err := cmd.Start(); err != nil {
		return held{}, err
	}
	if _, err = out.Read(make([]byte, 1)); err != nil {
		err = fmt.Errorf("the client has not opened %d connections: %w", n, err)
	}
	var after usage
	if err == nil {
		after, err = lookAt(relays)
	}
	in.Close()
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return held{}, err
	}
	added := after.minus(before)
	each := float64(n * len(relays))
	return held{resident: float64(added.resident) / each, files: float64(added.files) / each}, nil
}

func ticksOf(relays []*process) (sum int, err error) {
	for _, p := range relays {
		n, err := p.ticks()
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func lookAt(relays []*process) (sum usage, err error) {
	for _, p := range relays {
		u, err := p.look()
		if err != nil {
			return usage{}, err
		}
		sum.files += u.files
		sum.resident += u.resident
	}
	return sum, nil
}
