package workload

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// object is a map whose keys are fields.
type object struct {
	d  *decoder
	n  *yaml.Node
	at *path
}

// object begins a map with these keys. Others are refused, or as the real one
// ignores them, if they are not strict, ignored too, but with a warning.
func (d *decoder) object(n *yaml.Node, at *path, strict bool, keys []string) object {
	o := object{d, n, at}
	n, ok := d.visit(n, at)
	if !ok {
		return o
	}
	o.n = n
	if n.Kind != yaml.MappingNode {
		if !blank(n) {
			d.fail(n, at, "%s where a map belongs, with some of the keys %s", describe(n), strings.Join(keys, ", "))
		}
		return o
	}
	var seen []string
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		name := d.text(k, at)
		switch {
		case d.err != nil:
			return o
		case slices.Contains(seen, name):
			d.fail(k, at, "%s is there twice", name)
		case slices.Contains(keys, name):
			seen = append(seen, name)
		case strict:
			d.fail(k, at, "unknown key %q; %s", name, advice(name, keys))
		default:
			d.warn(k, at, "the unknown key %q is ignored; %s", name, advice(name, keys))
		}
	}
	return o
}

// get returns the value of a key, or nil.
func (o object) get(key string) *yaml.Node {
	if o.d.err != nil || o.n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(o.n.Content); i += 2 {
		k := o.n.Content[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Value == key {
			return o.n.Content[i+1]
		}
	}
	return nil
}

// need is get for a key that must be there; hint says what to write.
func (o object) need(key, hint string) *yaml.Node {
	n := o.get(key)
	if n == nil {
		o.d.fail(o.n, o.at, "the key %s is missing%s", key, hint)
	}
	return n
}

func (o object) path(key string) *path { return &path{up: o.at, key: key} }

// text returns a string, or "" when there is none.
func (o object) text(key string) string {
	n := o.get(key)
	if n == nil {
		return ""
	}
	return o.d.text(n, o.path(key))
}

func (o object) needText(key string) string {
	o.need(key, "")
	return o.text(key)
}

func (o object) flag(key string) bool {
	n := o.get(key)
	if n == nil {
		return false
	}
	switch s := o.d.text(n, o.path(key)); s {
	case "true", "True", "TRUE":
		return true
	case "false", "False", "FALSE":
	default:
		o.d.fail(n, o.path(key), "%q is neither true nor false", s)
	}
	return false
}

func (o object) needFlag(key string) bool {
	o.need(key, "")
	return o.flag(key)
}

// optional returns the value of a key that may also be null.
func (o object) optional(key string) *yaml.Node {
	n := o.get(key)
	if n == nil {
		return nil
	}
	if v, ok := o.d.visit(n, o.path(key)); !ok || blank(v) || v.ShortTag() == "!!null" {
		return nil
	}
	return n
}

// word returns one of the words of an enumeration, or the first when the key is
// absent.
func word[E ~string](o object, key string, words ...E) E {
	n := o.get(key)
	if n == nil {
		return words[0]
	}
	return oneOf(o.d, n, o.path(key), words...)
}

func oneOf[E ~string](d *decoder, n *yaml.Node, at *path, words ...E) E {
	s := E(d.text(n, at))
	if !slices.Contains(words, s) {
		d.fail(n, at, "%q is none of %s", s, join(words))
		return words[0]
	}
	return s
}

func join[E ~string](words []E) string {
	s := make([]string, len(words))
	for i, w := range words {
		s[i] = string(w)
	}
	return strings.Join(s, ", ")
}
