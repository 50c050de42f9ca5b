package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The variants between two pods that speak mutual TLS, on both sides.
var (
	bothSides = []side{clientSide, serverSide}

	tlsLimit = variant{"TLS relay", bothSides, startLimit}
	hboneAll = variant{"HBONE", bothSides, func(ctx context.Context, b *bed, s side) (*standing, error) {
		return startMesh(ctx, b, s)
	}}
	// hboneApart makes a tunnel for each connection: no tunnel takes a second stream.
	hboneApart = variant{"HBONE, a tunnel each", bothSides, func(ctx context.Context, b *bed, s side) (*standing, error) {
		return startMesh(ctx, b, s, "POOL_MAX_STREAMS_PER_CONNECTION=1")
	}}
)

// apart are more addresses of the server's pod, one for each client that does
// nothing but connect: the pool makes one tunnel at a time to an address.
const (
	apartNet   = "10.0.3.128/25"
	apartFirst = 128
)

func apartAddr(i int) string { return fmt.Sprintf("10.0.3.%d", apartFirst+i) }

// runMesh measures the variants in turns and returns the table.
func runMesh(ctx context.Context, o options) (table string, err error) {
	b := &bed{options: o}
	if b.self, err = os.Executable(); err != nil {
		return "", err
	}
	variants := []variant{noMesh, tlsLimit, hboneAll}
	rounds := make(map[string][]trafficRound)
	for i := range b.traffic.rounds {
		note("mesh, round %d of %d", i+1, b.traffic.rounds)
		for j := range variants {
			v := variants[(i+j)%len(variants)]
			r, err := b.round(ctx, v)
			if err == nil && v.name == hboneAll.name {
				err = b.standing(ctx, hboneApart, func(relays []*process) error { return b.carryApart(ctx, &r, relays) })
			}
			if err != nil {
				return "", fmt.Errorf("%s: %w", v.name, err)
			}
			if v.name == tlsLimit.name {
				r.connsApart, r.idleApart = r.conns, r.idle // it knows no other way
			}
			rounds[v.name] = append(rounds[v.name], r)
		}
	}
	return meshTable(o.traffic, rounds), nil
}

// carryApart measures what connections cost of which each has a tunnel.
func (b *bed) carryApart(ctx context.Context, r *trafficRound, relays []*process) error {
	// Idle ones first: what has carried traffic has memory at hand.
	var err error
	if r.idleApart, err = b.hold(ctx, apartIdle(b.traffic), relays); err != nil {
		return err
	}
	got, err := b.client(ctx, "connect-apart", fmt.Sprint(connecting), b.traffic.each.String())
	if err != nil {
		return err
	}
	r.connsApart = got.Count / got.Seconds
	r.failed += got.Failed
	return nil
}

// apartIdle is how many idle connections with a tunnel each to hold.
func apartIdle(o trafficOptions) int { return max(1, o.idle/10) }

// startMesh is startZtunnel with a mesh.
func startMesh(ctx context.Context, b *bed, s side, env ...string) (*standing, error) {
	who, err := b.whoIsWho(ctx)
	if err != nil {
		return nil, err
	}
	if s == serverSide {
		if err := b.addressesApart(ctx); err != nil {
			return nil, err
		}
	}
	env = append(env, "FAKE_CA=true", "NODE_NAME="+s.node())
	return startPair(ctx, b, s, env, "--local-xds", who, "--ca-dir", b.caDir())
}

func (b *bed) caDir() string { return filepath.Join(b.dir, "ca") }

// whoIsWho writes the local file, in which the server's pod has all its addresses.
func (b *bed) whoIsWho(ctx context.Context) (file string, err error) {
	out, err := b.world(ctx, "mesh")
	if err != nil {
		return "", err
	}
	addrs := []string{serverAddr}
	for i := range connecting {
		addrs = append(addrs, apartAddr(i))
	}
	text := strings.Replace(string(out), `["`+serverAddr+`"]`, `["`+strings.Join(addrs, `", "`)+`"]`, 1)
	file = filepath.Join(b.dir, "mesh.yaml")
	return file, os.WriteFile(file, []byte(text), 0o600)
}

func (b *bed) addressesApart(ctx context.Context) error {
	err := b.command(ctx, serverSide.node(), "ip", "route", "add", apartNet, "dev", strings.Replace(serverSide.pod(), "pod", "veth", 1)).Run()
	for i := range connecting {
		err = errors.Join(err, b.command(ctx, serverSide.pod(), "ip", "addr", "add", apartAddr(i)+"/32", "dev", "eth0").Run())
	}
	return err
}

// startLimit captures the pod of a side with the same rules, for the limit.
func startLimit(ctx context.Context, b *bed, s side) (*standing, error) {
	peer := clientSide
	if s == clientSide {
		peer = serverSide
	}
	return startInPod(ctx, b, s, "limit", s.pod(), peer.pod(), b.caDir())
}
