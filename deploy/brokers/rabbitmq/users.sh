#!/bin/sh
# RabbitMQ: users and their rights; the roles are those of ../mosquitto/acl. NOT RUN by us.
#
#   ./users.sh > users && sh users      on the broker, as a user who may use rabbitmqctl
#
# Prints the commands; rabbitmqctl asks for each password, on standard input, so they are not to be
# piped into a shell. A user has rights over its queue (a subscription is one; its name holds the
# client id) and, by regular expressions, over topics, in which / is a dot here. {username} is put in
# by RabbitMQ. Since the queue's name is bound to the user's, everybody's client id must be its user
# name; only `edged ask` and `edged top` choose ids of their own.
set -eu

ANY='[^.]+'

# user NAME QUEUES WRITE READ: WRITE and READ are about topics; an expression that fits nothing is ^$
user() {
    echo "rabbitmqctl add_user '$1'"
    if [ "$2" = none ]; then
        echo "rabbitmqctl set_permissions -p / '$1' '^\$' '^amq\\.topic\$' '^\$'"
    else
        queue="mqtt-subscription-$2qos[01]"
        echo "rabbitmqctl set_permissions -p / '$1' '^$queue\$' '^($queue|amq\\.topic)\$' '^($queue|amq\\.topic)\$'"
    fi
    echo "rabbitmqctl set_topic_permissions -p / '$1' amq.topic '$3' '$4'"
}

device() {  # with mqtt.client_id = NAME in edged.toml, and the camera connection's own user
    r="^edged\\.$1\\."
    user "$1" '{username}' \
        "${r}(response\\..+|refused|status|info|health|camera\\.$ANY\\.status)\$|^edged\\.reply\\..+\$" \
        "${r}(request\\..+|status)\$"
    user "$1-cameras" '{username}' '^$' "${r}camera\\.[^.#]+\\.frame\$"
}

camera() {  # NAME DEVICE
    user "$1" none "^edged\\.$2\\.camera\\.{username}\\.frame\$" '^$'
}

client() {
    user "$1" '{username}' "^edged\\.$ANY\\.request\\.$ANY\\.{username}\$" \
        "^edged\\.$ANY\\.(response\\.{username}\\..+|status|info)\$|^edged\\.reply\\.{username}\\..+\$"
}

operator() {
    user "$1" 'edged-(ask|top)-[0-9a-f]{8}' "^edged\\.$ANY\\.request\\.$ANY\\.{username}\$" '^edged\..+$'
}

monitor() {
    user "$1" '{username}' '^$' "^edged\\.$ANY\\.(status|info|health|camera\\.$ANY\\.status)\$"
}

device door
camera yard door
client desk
operator operator
monitor monitor
