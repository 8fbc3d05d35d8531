// Package contract is virt-trust's D-Bus contract as data.
package contract

import _ "embed"

// XML is org.virttrust1.xml: every interface of org.virttrust1(5).
//
//go:embed org.virttrust1.xml
var XML string

// AgentXML is org.virttrust1.Agent.xml: what virt-trust-agent offers.
//
//go:embed org.virttrust1.Agent.xml
var AgentXML string
