package workload

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// MaxFile is how long a file may be, in bytes: a hundred thousand workloads. It
// takes some thirty times as much memory while it is read.
const MaxFile = 32 << 20

// file is a file as it is written, in its order.
type file struct {
	workloads []*Workload
	services  []*Service
	policies  []*Policy
}

// Parse reads the local configuration: YAML, or JSON as far as that goes (it has
// no tags, and so no string matchers). An error is a *FileError and names a line.
//
// It accepts what the real one accepts, with two exceptions. A key that comes
// twice is refused, because one of its values would be lost. So is a file with
// nothing in it, because that is what a file looks like while an editor writes it.
func Parse(data []byte) (*State, error) {
	root, err := document(data)
	if err != nil {
		return nil, err
	}
	d := &decoder{budget: len(data) + 1<<20}
	f := d.file(root)
	if d.err != nil {
		return nil, d.err
	}
	return newState(f, d.warnings), nil
}

// document returns the root of the only document in data.
func document(data []byte) (*yaml.Node, error) {
	if len(data) > MaxFile {
		return nil, &FileError{1, "", fmt.Sprintf("the file has %d bytes; the most is %d", len(data), MaxFile)}
	}
	if at := notText(data); at >= 0 {
		return nil, &FileError{line(data, at), "", "there are bytes that are no UTF-8 text"}
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF), err == nil && len(doc.Content) == 0, err == nil && blank(doc.Content[0]):
		return nil, &FileError{1, "", "the file is empty; write {} for a configuration with nothing in it"}
	case err != nil:
		return nil, syntaxError(data, err)
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		return nil, &FileError{second.Line, "", "there is a second document (after ---); write all into one"}
	case !errors.Is(err, io.EOF):
		return nil, syntaxError(data, err)
	}
	return doc.Content[0], nil
}

// notText returns where data stops to be text that YAML allows, or -1.
func notText(data []byte) int {
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && size == 1 || r < ' ' && r != '\n' && r != '\r' && r != '\t' {
			return i
		}
		i += size
	}
	return -1
}

func line(data []byte, at int) int { return bytes.Count(data[:at], []byte("\n")) + 1 }

var (
	yamlLine   = regexp.MustCompile(`^line (\d+): `)
	yamlAnchor = regexp.MustCompile(`^unknown anchor '(.*)' referenced`)
	yamlParser = regexp.MustCompile(`^did not find expected (node content|key|'-' indicator|',' or|'<)|^found (duplicate %|incompatible YAML|undefined tag)`)
)

// syntaxError puts the library's words into ours. It leaves out the line when
// that is the first, and when an anchor is not there; its parser counts lines
// from 0, but not its scanner.
func syntaxError(data []byte, err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	at := 1
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		at, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
		if yamlParser.MatchString(text) {
			at++
		}
	} else if m := yamlAnchor.FindStringSubmatch(text); m != nil {
		at = line(data, max(0, bytes.Index(data, []byte("*"+m[1]))))
	}
	return fileError(at, "", text)
}

var topKeys = []string{"workloads", "policies", "services"}

func (d *decoder) file(n *yaml.Node) *file {
	o := d.object(n, nil, true, topKeys)
	return &file{
		workloads: list(d, o.get("workloads"), o.path("workloads"), d.workload),
		services:  list(d, o.get("services"), o.path("services"), d.service),
		policies:  list(d, o.get("policies"), o.path("policies"), d.policy),
	}
}

var workloadKeys = []string{
	"workloadIps", "namespace", "services", "uid", "name", "serviceAccount", "trustDomain", "protocol", "networkMode",
	"network", "node", "clusterId", "workloadName", "workloadType", "canonicalName", "canonicalRevision", "hostname",
	"waypoint", "networkGateway", "nativeTunnel", "applicationTunnel", "authorizationPolicies", "status", "locality", "capacity",
}

func (d *decoder) workload(n *yaml.Node, at *path) *Workload {
	o := d.object(n, at, true, workloadKeys)
	w := &Workload{
		IPs:                   list(d, o.need("workloadIps", "; write [] if it has none"), o.path("workloadIps"), d.ip),
		Namespace:             o.needText("namespace"),
		services:              dict(d, o.need("services", "; write {} if it serves none"), o.path("services"), d.namespacedHostname, d.ports),
		UID:                   o.text("uid"),
		Name:                  o.text("name"),
		ServiceAccount:        o.text("serviceAccount"),
		TrustDomain:           o.text("trustDomain"),
		Protocol:              word(o, "protocol", TCP, HBONE),
		NetworkMode:           word(o, "networkMode", Standard, HostNetwork),
		Network:               o.text("network"),
		Node:                  o.text("node"),
		Cluster:               o.text("clusterId"),
		WorkloadName:          o.text("workloadName"),
		WorkloadType:          o.text("workloadType"),
		CanonicalName:         o.text("canonicalName"),
		CanonicalRevision:     o.text("canonicalRevision"),
		Hostname:              o.text("hostname"),
		Waypoint:              o.gateway("waypoint"),
		NetworkGateway:        o.gateway("networkGateway"),
		NativeTunnel:          o.flag("nativeTunnel"),
		AuthorizationPolicies: list(d, o.get("authorizationPolicies"), o.path("authorizationPolicies"), d.text),
		Status:                word(o, "status", Healthy, Unhealthy),
		Capacity:              1,
	}
	if n := o.get("capacity"); n != nil {
		w.Capacity = uint32(d.number(n, o.path("capacity"), 32))
	}
	if n := o.optional("applicationTunnel"); n != nil {
		w.ApplicationTunnel = d.applicationTunnel(n, o.path("applicationTunnel"))
	}
	if n := o.get("locality"); n != nil {
		w.Locality = d.locality(n, o.path("locality"))
	}
	return w
}

func (d *decoder) applicationTunnel(n *yaml.Node, at *path) *ApplicationTunnel {
	o := d.object(n, at, false, []string{"protocol", "port"})
	o.need("protocol", "; write NONE or PROXY")
	t := &ApplicationTunnel{Protocol: word(o, "protocol", TunnelNone, TunnelPROXY)}
	if n := o.optional("port"); n != nil {
		port := d.port(n, o.path("port"))
		t.Port = &port
	}
	return t
}

func (d *decoder) locality(n *yaml.Node, at *path) *Locality {
	o := d.object(n, at, false, []string{"region", "zone", "subzone"})
	l := Locality{o.needText("region"), o.needText("zone"), o.needText("subzone")}
	if l == (Locality{}) {
		return nil
	}
	return &l
}

func (d *decoder) ip(n *yaml.Node, at *path) netip.Addr {
	ip := parsed(d, n, at, parseIP)
	if ip.Is4In6() {
		d.warnMapped(n, at, ip, ip.Unmap())
	}
	return ip
}

// warnMapped is for an IPv4 address in IPv6. A connection's is unmapped before it is
// compared, here as in the real one, and so a policy with such protects nobody.
func (d *decoder) warnMapped(n *yaml.Node, at *path, is, meant fmt.Stringer) {
	d.warn(n, at, "%q never matches; IPv4 addresses are written as such: %q", is, meant)
}

func (d *decoder) namespacedHostname(n *yaml.Node, at *path) NamespacedHostname {
	return parsed(d, n, at, parseNamespacedHostname)
}

func (d *decoder) networkAddress(n *yaml.Node, at *path) NetworkAddress {
	a := parsed(d, n, at, parseNetworkAddress)
	if a.IP.Is4In6() {
		d.warnMapped(n, at, a, NetworkAddress{a.Network, a.IP.Unmap()})
	}
	return a
}

// parsed reads a string that stands for something.
func parsed[T any](d *decoder, n *yaml.Node, at *path, parse func(string) (T, error)) T {
	s := d.text(n, at)
	v, err := parse(s)
	if err != nil {
		d.fail(n, at, "%v", err)
	}
	return v
}

// mappedBits are in front of an IPv4 address in IPv6.
const mappedBits = 96

func (d *decoder) prefix(n *yaml.Node, at *path) netip.Prefix {
	p := parsed(d, n, at, func(s string) (netip.Prefix, error) {
		p, err := netip.ParsePrefix(s)
		if err == nil {
			return p, nil
		}
		if ip, err := parseIP(s); err == nil {
			return p, fmt.Errorf("%q has no prefix length; write \"%s/%d\" for the one address", s, s, ip.BitLen())
		}
		return p, fmt.Errorf("%q is no CIDR, such as \"10.0.0.0/8\"", s)
	})
	if bits := p.Bits() - mappedBits; p.Addr().Is4In6() && bits >= 0 {
		d.warnMapped(n, at, p, netip.PrefixFrom(p.Addr().Unmap(), bits))
	}
	return p
}

func (d *decoder) ports(n *yaml.Node, at *path) map[uint16]uint16 {
	return dict(d, n, at, d.port, d.port)
}

// gateway returns the gateway that a key refers to, or nil.
func (o object) gateway(key string) *Gateway {
	n := o.optional(key)
	if n == nil {
		return nil
	}
	return o.d.gateway(n, o.path(key))
}

func (d *decoder) gateway(n *yaml.Node, at *path) *Gateway {
	o := d.object(n, at, true, []string{"destination", "hboneMtlsPort"})
	destination := o.needText("destination")
	port := o.need("hboneMtlsPort", fmt.Sprintf("; it is mostly %d", PortHBONE))
	if d.err != nil {
		return nil
	}
	g, err := parseGateway(destination, d.port(port, o.path("hboneMtlsPort")))
	if err != nil {
		d.fail(o.get("destination"), o.path("destination"), "%v", err)
	}
	return g
}
