package proxy

import (
	"context"
	"log/slog"
	"strings"
	"sync"

	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// Mesh is what makes a mesh of pods: who is who, what proves it, and how tunnels
// are made. Without one, everything is carried in the clear. Its owner keeps it
// until the last pod has ended, and calls Watch.
type Mesh struct {
	Store      *workload.Store
	Identities *identity.Manager
	CRL        *identity.CRL // nil: nothing is revoked
	HBONE      hbone.Config
	Network    string // NETWORK: the one we are on

	ResponseBaggage    bool // ENABLE_RESPONSE_BAGGAGE
	LocalhostAppTunnel bool // LOCALHOST_APP_TUNNEL
	PolicyInfo         bool // AUTHZ_POLICY_INFO_LOGGING
	Dedicated          bool // PROXY_MODE=dedicated: no certificate before somebody needs it
	Log                *slog.Logger

	mu   sync.Mutex
	pods map[*Pod]struct{}
}

// Watch judges connections that run again whenever the policies may have changed,
// until ctx ends. (The real ztunnel does so when the control plane sends policies,
// and never looks at its file again.)
func (m *Mesh) Watch(ctx context.Context) {
	for {
		_, changed := m.Store.Watch()
		for _, p := range m.all() {
			p.rejudge()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Revoke ends the tunnels of peers whose certificate has been revoked.
func (m *Mesh) Revoke() {
	for _, p := range m.all() {
		p.revoke(m.CRL)
	}
}

func (m *Mesh) all() []*Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	pods := make([]*Pod, 0, len(m.pods))
	for p := range m.pods {
		pods = append(pods, p)
	}
	return pods
}

// join makes a pod a member of the mesh.
func (m *Mesh) join(p *Pod) {
	p.pool = hbone.NewPool(m.HBONE)
	p.tunnels = make(map[*tunnel]struct{})
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pods == nil {
		m.pods = make(map[*Pod]struct{})
	}
	m.pods[p] = struct{}{}
	p.wg.Add(1)
	go p.prefetch()
}

// part ends the membership.
func (m *Mesh) part(p *Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pods, p)
}

// prefetch has the pod's certificate made before somebody waits for it, and claims
// it for as long as the pod lives.
func (p *Pod) prefetch() {
	defer p.wg.Done()
	own, err := p.own()
	if err != nil && p.ctx.Err() == nil {
		p.config.Log.Warn("no workload of the file is this pod, and until one is its connections wait and fail: do name, namespace and service account agree, and NODE_NAME?",
			"pod", p.String(), "service_account", p.ServiceAccount)
	}
	if err != nil || own.Protocol != workload.HBONE || p.mesh().Dedicated {
		return
	}
	id := idOf(own)
	p.mesh().Identities.Prefetch(id)
	<-p.ctx.Done()
	p.mesh().Identities.Forget(id)
}

func (p *Pod) mesh() *Mesh { return p.config.Mesh }

// own returns the pod's workload, for which it waits a while: a pod may be here
// before what is known of it.
func (p *Pod) own() (*workload.Workload, error) {
	own, err := p.mesh().Store.Local(p.ctx, p.Name, p.Namespace, p.ServiceAccount)
	if err != nil && p.ctx.Err() != nil {
		err = errDrained
	}
	return own, err
}

func idOf(w *workload.Workload) identity.ID {
	return identity.ID{TrustDomain: w.TrustDomain, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}

// parseIDs reads what a route expects. workload has left out what is none.
func parseIDs(names []string) []identity.ID {
	ids := make([]identity.ID, 0, len(names))
	for _, name := range names {
		if id, err := identity.ParseID(name); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// authorize asks the policies that are in force, and tells what those would say that
// are only tried out. own may be of an earlier state: by now the pod may name other
// policies. One that is not known any more keeps those that it had.
func (m *Mesh) authorize(own *workload.Workload, peer workload.Peer) error {
	state := m.Store.State()
	if now := state.WorkloadByUID(own.UID); now != nil {
		own = now
	}
	dry, err := state.Authorize(own, peer)
	level := slog.LevelDebug
	if m.PolicyInfo {
		level = slog.LevelInfo
	}
	for _, d := range dry {
		m.Log.Log(context.Background(), level, "dry-run policy", "policy", d.Policy.Key(), "matched", d.Matched, "src", peer.Src, "dst", peer.Dst)
	}
	return err
}

// poolKey names the tunnels that a connection may use.
func poolKey(l *line, own *workload.Workload, route workload.Route) hbone.Key {
	return hbone.Key{Source: own.Identity(), Expected: strings.Join(route.Identities, ","), Dst: route.NextHop, SrcIP: l.src.Addr()}
}
